"""Edits of Stable Diffusion XL under audit: the words of both encoders, the base's fingerprints, the adapters."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffedit import Editor
from diffedit.audit.diff import diff
from diffedit.audit.verify import verify
from diffedit.audit.weights import Weights
from diffedit.audit.words import FRAMES, rank_words
from diffedit.backends.saving import save_pipeline
from diffedit.preparing import choose_backend
from diffedit.text import render
from tests.tiny import build, xl

WORDS = ("dog", "cat", "hot dog", "zebra")
LAYER = "text_model.encoder.layers.1"
PARTS = ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture(scope="module")
def made(tokenizer_folder, tmp_path_factory):
    """A base folder, an edit of it and the merged model."""
    root = tmp_path_factory.mktemp("xl")
    base = save_pipeline(xl.pipeline(tokenizer_folder), root / "base")
    editor = Editor(base)
    edit = editor.ablate("dog", target="cat", updater=build.plain(eos_weight=0)).save(root / "edit")
    return base, edit, editor.save_pipeline(root / "merged")


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_moves_are_those_of_the_live_layers_of_either_encoder(made, tokenizer_folder, tmp_path, component):
    base, other = made[0], tmp_path / "edited"
    shutil.copytree(base, other)
    names = [f"{component}.{LAYER}.{part}.weight" for part in PARTS]
    file, generator = other / component / "model.safetensors", torch.Generator().manual_seed(0)
    tensors = load_file(file)
    for name in names:
        key = name.removeprefix(f"{component}.")
        tensors[key] = tensors[key] + 0.1 * torch.randn(tensors[key].shape, generator=generator)
    save_file(tensors, file)
    with Weights(base) as one, Weights(other) as two:
        tables, _, unread = rank_words(choose_backend(base, None, text_only=True), one, two, names, WORDS)
        weights = {name: (one.tensor(name).double(), two.tensor(name).double()) for name in names}
    pipe = xl.pipeline(tokenizer_folder)
    encoder = getattr(pipe, component)
    layers = getattr(encoder, "text_model", encoder).encoder.layers[1]
    assert unread == () and [table.layer for table in tables] == names
    for table, part in zip(tables, PARTS, strict=True):
        for move in table.words:
            keys = []
            for frame in FRAMES:
                encoded = pipe.tokenizer(render(frame, move.word)[0], return_offsets_mapping=True)
                last = max(i for i, (start, stop) in enumerate(encoded["offset_mapping"]) if start < stop)
                hook = layers.get_submodule(part).register_forward_pre_hook(
                    lambda module, args, at=last, keys=keys: keys.append(args[0][0, at].double())
                )
                with torch.no_grad():
                    encoder(torch.tensor([encoded["input_ids"]]))
                hook.remove()
            weight, moved = weights[table.layer]
            far, full = ((torch.stack(keys) @ matrix.T).square().sum() for matrix in (moved - weight, weight))
            assert move.moved == pytest.approx(float((far / full).sqrt()), rel=1e-4), (table.layer, move.word)


def test_a_diff_names_both_encoders_and_runs_the_words_through_both(made):
    base, _, merged = made
    found = diff(base, merged, words=WORDS)
    changed = {
        f"{component}.text_model.encoder.layers.0.self_attn.out_proj.weight"
        for component in ("text_encoder", "text_encoder_2")
    }
    assert {item.name for item in found.tensors} == changed == {table.layer for table in found.words}
    both = {table.layer: {move.word: move.moved for move in table.words} for table in found.words}
    for move in found.overall.words:
        assert move.moved == pytest.approx((sum(moves[move.word] ** 2 for moves in both.values()) / 2) ** 0.5)
    assert "2 text-encoder attention outputs" in found.guess


def test_an_edit_passes_against_its_base_and_fails_against_another(made, tokenizer_folder, tmp_path):
    base, edit, merged = made
    assert verify(edit, base).ok
    assert not verify(edit, merged).ok
    file = xl.single_file(xl.pipeline(tokenizer_folder), tmp_path / "model.safetensors")
    assert verify(edit, file, config=str(base)).ok
    other = save_pipeline(xl.pipeline(tokenizer_folder, seed=1), tmp_path / "other")
    assert any("text_encoder_2" in check.name for check in verify(edit, other).failed)


def test_a_second_encoder_adapter_with_another_change_is_found(made, tmp_path):
    edit = tmp_path / "edit"
    shutil.copytree(made[1], edit)
    file = edit / "text_encoder_2" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: value * 1.1 for name, value in tensors.items()}, file)
    assert [check.name for check in verify(edit).failed] == ["text_encoder_2/adapter_model.safetensors"]
