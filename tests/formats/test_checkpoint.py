"""Single-file checkpoints: a new file with the edit in it, in which no byte but the edited tensors' differs."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from diffedit import Editor
from diffedit.backends.checkpoint import save_checkpoint
from diffedit.backends.tensorfile import CHUNK, copy_patched, open_tensors
from diffedit.errors import (
    MalformedArtifactError,
    NoOpError,
    OutputExistsError,
    StorageError,
    SwallowedError,
    UnsafeFormatError,
    UnsupportedModelError,
    UnsupportedTensorError,
)
from tests.formats.made import KEY, PARTS, VALUE, denoise, embed, gap, random_edit, sites_of
from tests.formats.test_merged_folder import check_bytes, places

NAMES = {
    "sd1": "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.out_proj.weight",
    "sd2": "cond_stage_model.model.transformer.resblocks.0.attn.out_proj.weight",
}
FC2 = {
    "sd1": "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc2.weight",
    "sd2": "cond_stage_model.model.transformer.resblocks.0.mlp.c_proj.weight",
}
CROSS = [
    f"model.diffusion_model.{block}.1.transformer_blocks.0.attn2.{layer}.weight"
    for block in ("input_blocks.1", "middle_block", "output_blocks.2", "output_blocks.3")
    for layer in ("to_k", "to_v")
]


@pytest.fixture
def file(checkpoints, family) -> Path:
    return checkpoints[family]


@pytest.mark.parametrize("part", PARTS)
def test_only_the_edited_tensors_bytes_differ(file, base, family, part, tmp_path):
    editor = Editor(file, config=str(base))
    plain = embed(editor.pipeline), denoise(editor.pipeline)
    before = file.read_bytes()
    edit = random_edit(editor, sites_of(editor, part))
    out = tmp_path / "edited.safetensors"
    names = save_checkpoint(editor.backend, file, out)
    wanted = ([NAMES[family], FC2[family]] if part != "unet" else []) + (CROSS if part != "text" else [])
    assert sorted(names) == sorted(wanted) and sorted(names.values()) == sorted(edit.delta.sites)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [out]
    spans = places(file)
    assert spans == places(out)
    check_bytes(file, out, [spans[name] for name in names])
    stock = StableDiffusionPipeline.from_single_file(str(out), config=str(base))
    for pipe in (stock, Editor(out, config=str(base)).pipeline):
        assert torch.equal(embed(pipe), embed(editor.pipeline))
        assert gap(denoise(pipe), denoise(editor.pipeline)) < 1e-6
    assert gap(embed(stock), plain[0]) > (1e-2 if part != "unet" else -1) and gap(denoise(stock), plain[1]) > 1e-2


def test_a_half_precision_file_stays_so(file, base, family, tmp_path):
    """As they are traded: float16, with tensors of other kinds and metadata of their own."""
    half = {name: tensor.half() for name, tensor in load_file(file).items()}
    half["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(half, tmp_path / "half.safetensors", {"format": "pt", "author": "somebody, \u00e9"})
    editor = Editor(tmp_path / "half.safetensors", config=str(base))
    edit = random_edit(editor, sites_of(editor, "mixed"))
    out = tmp_path / "edited.safetensors"
    names = save_checkpoint(editor.backend, tmp_path / "half.safetensors", out, sites=edit.delta.sites)
    old, new = load_file(tmp_path / "half.safetensors"), load_file(out)
    assert {name for name in old if not torch.equal(old[name], new[name])} == set(names)
    for name, site in names.items():
        assert new[name].dtype is torch.float16
        assert torch.equal(new[name], editor.backend.weight(site).detach().half())
    head = 8 + int.from_bytes(out.read_bytes()[:8], "little")
    assert out.read_bytes()[:head] == (tmp_path / "half.safetensors").read_bytes()[:head]


def test_early_files_without_the_level_text_model(checkpoints, bases, tmp_path):
    prefix = "cond_stage_model.transformer."
    tensors = {
        key.replace(f"{prefix}text_model.", prefix): value for key, value in load_file(checkpoints["sd1"]).items()
    }
    save_file(tensors, tmp_path / "early.safetensors")
    editor = Editor(checkpoints["sd1"], config=str(bases["sd1"]))
    random_edit(editor, sites_of(editor, "text"))
    names = save_checkpoint(editor.backend, tmp_path / "early.safetensors", tmp_path / "edited.safetensors")
    assert f"{prefix}encoder.layers.0.mlp.fc2.weight" in names


def test_the_true_block_numbers(tokenizer_folder):
    """Names of all sixteen cross-attention blocks of Stable Diffusion, against the original code's numbering."""
    from diffusers import UNet2DConditionModel

    from diffedit.backends.ldm import checkpoint_names
    from diffedit.backends.unet import cross_attention_sites

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            cross_attention_dim=768, block_out_channels=(32, 64, 128, 128), norm_num_groups=32, attention_head_dim=8
        )
    sites = cross_attention_sites(unet)
    assert len(sites) == 32
    names = [checkpoint_names(site, 2) for site in sites if site.role is KEY]
    # openaimodel.py: attention in input blocks 1, 2, 4, 5, 7, 8, in the middle, and in output blocks 3 to 11
    places = [f"input_blocks.{i}" for i in (1, 2, 4, 5, 7, 8)] + ["middle_block"]
    places += [f"output_blocks.{i}" for i in range(3, 12)]
    wanted = [f"model.diffusion_model.{place}.1.transformer_blocks.0.attn2.to_k.weight" for place in places]
    assert names == [(name,) for name in wanted]


@pytest.fixture
def edited(checkpoints, bases):
    editor = Editor(checkpoints["sd1"], config=str(bases["sd1"]))
    random_edit(editor, sites_of(editor, "mixed"))
    return editor, checkpoints["sd1"]


def test_the_input_is_never_the_output(edited, tmp_path):
    editor, file = edited
    mine = Path(shutil.copyfile(file, tmp_path / "mine.safetensors"))
    (tmp_path / "link.safetensors").symlink_to(mine)
    os.link(mine, tmp_path / "hard.safetensors")
    for out in (
        mine,
        tmp_path / "link.safetensors",
        tmp_path / "hard.safetensors",
        tmp_path / "." / "mine.safetensors",
    ):
        with pytest.raises(OutputExistsError, match="the output is the input"):
            save_checkpoint(editor.backend, mine, out)
    (tmp_path / "other.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match="already there"):
        save_checkpoint(editor.backend, mine, tmp_path / "other.safetensors")
    assert mine.read_bytes() == file.read_bytes() and (tmp_path / "other.safetensors").read_bytes() == b"mine"


def test_what_cannot_be_patched_is_refused_and_nothing_is_left(edited, bases, tmp_path):
    editor, file = edited
    out = tmp_path / "out.safetensors"

    def variant(name: str, change) -> Path:
        save_file(change(load_file(file)), tmp_path / name)
        return tmp_path / name

    averaged = variant("ema.safetensors", lambda t: {**t, "model_ema.decay": torch.ones(1)})
    lost = variant("lost.safetensors", lambda t: {k: v for k, v in t.items() if k != NAMES["sd1"]})
    twice = variant("twice.safetensors", lambda t: {**t, NAMES["sd2"]: t[NAMES["sd1"]].clone()})
    other = variant("shape.safetensors", lambda t: {**t, NAMES["sd1"]: torch.ones(3, 3)})
    integers = variant("integers.safetensors", lambda t: {**t, NAMES["sd1"]: torch.ones(32, 32, dtype=torch.int8)})
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "short.safetensors").write_bytes(b"\x01")
    cases = [
        (averaged, UnsupportedModelError, "averaged copy of its UNet"),
        (lost, UnsupportedModelError, "does not hold the layer"),
        (twice, UnsupportedModelError, "holds the layer twice"),
        (other, UnsupportedTensorError, "another shape"),
        (integers, UnsupportedTensorError, "not floating-point"),
        (cut, MalformedArtifactError, "place does not fit"),
        (tmp_path / "short.safetensors", MalformedArtifactError, "cut short"),
        (tmp_path / "missing.safetensors", StorageError, "cannot be read"),
        (tmp_path / "model.ckpt", UnsafeFormatError, "as .safetensors only"),
    ]
    before = sorted(tmp_path.iterdir())
    for source, error, message in cases:
        with pytest.raises(error, match=message):
            save_checkpoint(editor.backend, source, out)
    with pytest.raises(UnsafeFormatError):
        save_checkpoint(editor.backend, file, tmp_path / "folder")
    assert sorted(tmp_path.iterdir()) == before
    text = [site for site in editor.backend.sites() if site.layer == 0]
    assert len(save_checkpoint(editor.backend, averaged, out, sites=text)) == 2  # the text encoder has no second copy


def test_an_unedited_model_is_no_work(checkpoints, bases, tmp_path):
    editor = Editor(checkpoints["sd1"], config=str(bases["sd1"]))
    random_edit(editor, sites_of(editor, "mixed")).revert()
    with pytest.raises(NoOpError, match="are those of the file"):
        save_checkpoint(editor.backend, checkpoints["sd1"], tmp_path / "out.safetensors")


def test_an_edit_that_the_files_dtype_swallows_is_refused(checkpoints, bases, tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in load_file(checkpoints["sd1"]).items()}
    save_file(half, tmp_path / "half.safetensors")
    editor = Editor(tmp_path / "half.safetensors", config=str(bases["sd1"]))
    edit = random_edit(editor, editor.backend.sites(VALUE), size=1e-5)
    with pytest.raises(SwallowedError, match="float32 copy"):
        save_checkpoint(
            editor.backend, tmp_path / "half.safetensors", tmp_path / "out.safetensors", sites=edit.delta.sites
        )
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_failing_disk_leaves_nothing(edited, call, tmp_path, monkeypatch):
    editor, file = edited

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match="No space left"):
        save_checkpoint(editor.backend, file, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_last_fsync_that_fails_takes_the_file_back(edited, tmp_path, monkeypatch):
    editor, file = edited
    real, calls = os.fsync, []

    def fail(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="Input/output"):
        save_checkpoint(editor.backend, file, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == [] and len(calls) == 2


def test_large_files_are_streamed(tmp_path):
    """Ten chunks are copied with the memory of two."""
    size = 10 * CHUNK
    header = json.dumps(
        {
            "big": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
            "edited": {"dtype": "F32", "shape": [4], "data_offsets": [size, size + 16]},
        }
    ).encode()
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size + 16)
    source = open_tensors(path)
    tracemalloc.start()
    copy_patched(source, tmp_path / "copy.safetensors", {"edited": torch.ones(4)})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * CHUNK
    with (tmp_path / "copy.safetensors").open("rb") as file:
        file.seek(-16, os.SEEK_END)
        assert file.read() == torch.ones(4).numpy().tobytes()
        file.seek(-20, os.SEEK_END)
        assert file.read(4) == b"\0\0\0\0"


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}',
        b'{"__metadata__": 5}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_headers_that_no_checkpoint_has(header, tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(MalformedArtifactError):
        open_tensors(path)
