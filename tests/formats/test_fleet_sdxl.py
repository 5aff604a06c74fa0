"""Stable Diffusion XL checkpoints, many at once: folders, half precision and single files, from the command too."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModelWithProjection
from typer.testing import CliRunner

from diffedit import Editor
from diffedit.backends.saving import save_pipeline
from diffedit.cli import app
from diffedit.fleet import apply_to_models
from tests.formats.made import gap, tree
from tests.tiny import xl

PROMPTS = ["a photo of a dog", "a fox"]
SECOND = "text_encoder_2/model.safetensors"


@pytest.fixture(scope="module")
def fleet(tokenizer_folder, bases, tmp_path_factory):
    """A saved edit of both text encoders, and what it fits: a folder, its half-precision copy and a single file."""
    root = tmp_path_factory.mktemp("xl-fleet")
    save_pipeline(xl.pipeline(tokenizer_folder), root / "full")
    StableDiffusionXLPipeline.from_pretrained(root / "full").to(torch.float16).save_pretrained(root / "half")
    xl.single_file(xl.pipeline(tokenizer_folder), root / "one.safetensors")
    editor = Editor(root / "full")
    edit = editor.ablate("dog", target="cat")
    edit.save(root / "edit")
    wanted = xl.embed(editor.pipeline, PROMPTS)
    edit.revert()
    plain = xl.embed(editor.pipeline, PROMPTS)
    return edit, [root / name for name in ("full", "half", "one.safetensors")], wanted, plain


def run(fleet, out: Path, models=None, **options):
    edit, known, *_ = fleet
    return apply_to_models([edit], known if models is None else models, out, config=str(known[0]), **options)


def statuses(outcomes) -> list[str]:
    return [outcome.status for outcome in outcomes]


def distance(one, other) -> float:
    return max(gap(a.float(), b.float()) for a, b in zip(one, other, strict=True))


def test_both_encoders_of_every_model_are_edited_and_no_unet_is_built(fleet, tmp_path, monkeypatch):
    _, models, wanted, plain = fleet
    with monkeypatch.context() as patched:

        def refuse(*args, **kwargs):
            raise AssertionError("a UNet was built")

        patched.setattr(UNet2DConditionModel, "__init__", refuse)
        assert statuses(run(fleet, tmp_path)) == ["written"] * 3
        assert statuses(run(fleet, tmp_path)) == ["kept"] * 3
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "full")
    assert distance(xl.embed(stock, PROMPTS), wanted) == 0 < 0.01 < distance(plain, wanted)
    half = StableDiffusionXLPipeline.from_pretrained(tmp_path / "half", torch_dtype=torch.float16)
    assert half.text_encoder_2.dtype is torch.float16
    half = half.to(torch.float32)
    assert distance(xl.embed(half, PROMPTS), wanted) < 0.05 * distance(plain, wanted)
    single = Editor(tmp_path / "one.safetensors", config=str(models[0])).pipeline
    assert distance(xl.embed(single, PROMPTS), wanted) == 0
    for name in ("full", "half"):
        before, after = tree(models[0].parent / name), tree(tmp_path / name)
        more = after.keys() - before.keys()  # what old readers need of a tokenizer
        assert all(key.endswith(("vocab.json", "merges.txt")) for key in more)
        changed = {key for key in before if before[key] != after.get(key)}
        assert changed == {"text_encoder/model.safetensors", SECOND}


@pytest.mark.parametrize("share", [0.6, 0.0])
def test_a_copy_cut_short_in_its_second_encoder_is_written_again(fleet, tmp_path, share):
    models = fleet[1][:1]
    run(fleet, tmp_path, models)
    whole, file = tree(tmp_path), tmp_path / "full" / SECOND
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert statuses(run(fleet, tmp_path, models)) == ["written"]
    assert tree(tmp_path) == whole


def test_a_copy_with_one_encoder_unedited_is_something_else(fleet, tmp_path):
    models = fleet[1][:1]
    run(fleet, tmp_path, models)
    shutil.copyfile(models[0] / SECOND, tmp_path / "full" / SECOND)
    left = tree(tmp_path)
    (outcome,) = run(fleet, tmp_path, models)
    assert (outcome.status, outcome.code) == ("failed", "DE-504") and tree(tmp_path) == left
    assert statuses(run(fleet, tmp_path, models, overwrite=True)) == ["written"]
    assert tree(tmp_path) != left


def test_one_model_at_a_time_is_in_memory(fleet, tmp_path):
    gc.collect()

    def count() -> int:
        return sum(isinstance(item, CLIPTextModelWithProjection) for item in gc.get_objects())

    before, seen = count(), []
    run(fleet, tmp_path, progress=lambda number, outcome: seen.append(count() - before))
    assert seen == [0, 0, 0]


def test_other_families_and_other_bases_fail_by_themselves(fleet, bases, tokenizer_folder, tmp_path):
    models = fleet[1]
    other = save_pipeline(xl.pipeline(tokenizer_folder, seed=5), tmp_path / "other")
    outcomes = run(fleet, tmp_path / "out", [other, bases["sd1"], models[0]])
    assert statuses(outcomes) == ["failed", "failed", "written"]
    assert [outcome.code for outcome in outcomes[:2]] == ["DE-600", "DE-600"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["full"]


def test_the_command_does_the_same(fleet, tmp_path):
    _, models, wanted, _ = fleet
    command = ["apply", "--edits", str(models[0].parent / "edit"), "--models", *map(str, models[:2])]
    for status in ("written", "kept"):
        done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out"), "--json"])
        assert done.exit_code == 0, done.output
        assert [model["status"] for model in json.loads(done.stdout)["models"]] == [status] * 2
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out" / "full")
    assert distance(xl.embed(stock, PROMPTS), wanted) == 0
