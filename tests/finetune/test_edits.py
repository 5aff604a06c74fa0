"""Proves that a trained change is an edit like any other: located, applied, reverted, saved, exported, typed in."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from diffedit import Editor
from diffedit.cli import app
from diffedit.delta import LowRank
from diffedit.errors import RequestError, UnsupportedModelError
from diffedit.locators.text_layers import TextLayersLocator
from diffedit.site import Role
from diffedit.testing import model_state
from tests.finetune.conftest import configure, listening, locate, request
from tests.saved_model import save_tiny_model


@pytest.mark.parametrize(
    ("method", "roles"),
    [
        ("esd", (Role.UNET_CROSS_ATTN_K, Role.UNET_CROSS_ATTN_V)),
        ("concept ablation", (Role.UNET_CROSS_ATTN_K, Role.UNET_CROSS_ATTN_V)),
        ("text encoder, embedding", (Role.TEXT_SELF_ATTN_OUT, Role.TEXT_MLP_OUT)),
    ],
)
def test_an_edit_is_made_saved_loaded_and_reverted(editor, tokenizer_folder, tmp_path, method, roles):
    before = model_state(editor.pipeline)
    edit = editor.ablate("dog", target="cat", updater=configure(method, steps=2), preserve=())
    expected = editor.backend.sites(*roles)
    assert set(edit.delta.sites) == set(expected)
    after = model_state(editor.pipeline)
    weights = {id(editor.backend.weight(site)) for site in expected}
    parts = {part: getattr(editor.pipeline, part) for part in ("text_encoder", "unet", "vae")}
    names = {f"{part}.{key}" for part, m in parts.items() for key, p in m.named_parameters() if id(p) in weights}
    assert {key for key in before if before[key] != after[key]} == names and len(names) == len(expected)
    record = edit.manifest.sites[0].diagnostics
    assert record["steps"] == 2 and record["truncation_error"] <= 0.001**0.5 and record["loss_before"] > 0
    assert "checkpoint_dir" not in edit.manifest.updater.settings and edit.manifest.updater.settings["steps"] == 2
    other = Editor(listening(tokenizer_folder))
    assert other.load(edit.save(tmp_path / "edit")).id == edit.id
    assert model_state(other.pipeline) == after
    edit.revert()
    assert model_state(editor.pipeline) == before


def test_rank_and_energy_decide_what_is_kept_and_the_error_is_told(editor):
    location = locate(editor, configure("esd"))
    exact = configure("esd", energy=1.0).train(editor.backend, [request()], location)
    dense = {site: change.dense() for site, change in exact.delta}
    low = configure("esd", rank=2).train(editor.backend, [request()], location)
    for site, change in low.delta:
        assert change.rank == 2
        error = float((dense[site] - change.dense()).norm() / dense[site].norm())
        assert low.delta.diagnostics[site].truncation_error == pytest.approx(error, rel=1e-3)
        best = LowRank.from_dense(dense[site], rank=2)
        assert error == pytest.approx(best.error, rel=1e-3)
    assert exact.loss == pytest.approx(exact.training.after, rel=1e-4) and low.loss != low.training.after


def test_several_concepts_are_trained_together(editor):
    both = [request(), request(subject="pig", target="house")]
    edit = editor.run(both, updater=configure("concept ablation", anchors=4, steps=2))
    assert [entry.subject for entry in edit.requests] == ["dog", "pig"]


def test_an_updater_of_the_unet_refuses_the_text_encoders_site(editor):
    with pytest.raises(UnsupportedModelError, match="the updater esd cannot edit these sites"):
        editor.ablate("dog", target="cat", updater="esd", locator="fixed")


def test_the_text_layers_locator_takes_a_range(editor):
    def names(**settings):
        return [(s.layer, s.role) for s in TextLayersLocator(**settings).locate(editor.backend, []).sites]

    attention, mlp = Role.TEXT_SELF_ATTN_OUT, Role.TEXT_MLP_OUT
    assert set(names()) == {(layer, role) for layer in range(3) for role in (attention, mlp)}
    assert names(mlp=False, first=1) == [(1, attention), (2, attention)]
    assert names(attention=False, last=0) == [(0, mlp)]
    with pytest.raises(RequestError, match="neither attention nor MLP"):
        names(attention=False, mlp=False)
    with pytest.raises(UnsupportedModelError, match="Choose layers from 0 to 2"):
        names(first=3)


def test_the_command_line_trains(tmp_path):
    model = save_tiny_model(tmp_path / "model", tmp_path)
    small = ["--set", "steps=2", "--set", "evaluations=1", "--set", "sampling_steps=2"]
    out = tmp_path / "no-dog"
    kept = ["--set", f"checkpoint_dir={tmp_path / 'kept'}"]
    command = ["ablate", str(model), "dog", "--target", "cat", "--updater", "esd", *small, *kept]
    made = CliRunner().invoke(app, [*command, "-o", str(out), "--json"])
    assert made.exit_code == 0, made.output
    edit = json.loads(made.stdout)["edit"]
    assert edit["updater"]["name"] == "esd" and edit["locator"]["name"] == "cross-attention"
    assert len(list((tmp_path / "kept").iterdir())) == 1 and (out / "pytorch_lora_weights.safetensors").exists()
    editor = Editor(str(model))
    unedited = editor.backend.weight(editor.backend.sites(Role.UNET_CROSS_ATTN_V)[0]).detach().clone()
    editor.load(out)
    assert not torch.equal(unedited, editor.backend.weight(editor.backend.sites(Role.UNET_CROSS_ATTN_V)[0]))
