"""`Edit.export`: what it writes is what stock diffusers loads, and the rounding that it states is the one measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from diffedit import Editor
from diffedit.delta import Delta, LowRank
from diffedit.edit import Edit
from diffedit.errors import NonFiniteError, OutputExistsError, SwallowedError, UnsupportedTensorError
from diffedit.io.names import kohya_name
from tests.formats.made import denoise, embed, gap, random_edit, sites_of

BOUNDS = {torch.float32: (1e-9, 1e-7), torch.float16: (1e-5, 6e-4), torch.bfloat16: (1e-4, 5e-3)}
FILES = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "unet/adapter_config.json",
    "unet/adapter_model.safetensors",
]


@pytest.fixture(scope="module")
def edited(bases):
    editor = Editor(bases["sd1"])
    return editor, random_edit(editor, sites_of(editor, "mixed"))


def measured(file: Path, edit: Edit) -> float:
    """|change in the file - change of the edit| / |change of the edit|, by its definition."""
    tensors, off, total = load_file(file), 0.0, 0.0
    for site, change in edit.delta:
        up, down = (tensors[f"{kohya_name(site)}.lora_{which}.weight"].double() for which in ("up", "down"))
        off += float((up @ down - change.dense()).square().sum())
        total += float(change.dense().square().sum())
    return (off / total) ** 0.5


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_stated_rounding_is_what_the_files_lost(edited, dtype, tmp_path):
    _, edit = edited
    done = edit.export(tmp_path / "out", dtype=dtype)
    low, high = BOUNDS[dtype]
    assert low < done.rounding < high
    assert done.rounding == pytest.approx(measured(done.path / "pytorch_lora_weights.safetensors", edit), rel=1e-6)
    assert done.dtype == str(dtype).removeprefix("torch.") and sorted(done.files) == FILES
    assert {name: (done.path / name).stat().st_size for name in FILES} == done.files
    card = (done.path / "README.md").read_text(encoding="utf-8")
    assert f"These adapters hold {done.dtype} factors" in card and f"{done.rounding:.1e} of its size" in card
    assert 'PeftModel.from_pretrained(pipe.unet, "ablate-dog", subfolder="unet")' in card
    assert "It warns" not in card and "edit.safetensors" not in card
    for name in ("adapter_model.safetensors", "unet/adapter_model.safetensors"):
        assert {tensor.dtype for tensor in load_file(done.path / name).values()} == {dtype}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 1e-2)])
def test_stock_diffusers_loads_an_export(edited, bases, dtype, bound, tmp_path):
    editor, edit = edited
    pipe = StableDiffusionPipeline.from_pretrained(bases["sd1"])
    plain = embed(pipe), denoise(pipe)
    pipe.load_lora_weights(edit.export(tmp_path / "out", dtype=dtype).path)
    wanted = embed(editor.pipeline), denoise(editor.pipeline)
    for before, after, goal in zip(plain, (embed(pipe), denoise(pipe)), wanted, strict=True):
        assert gap(after, goal) < bound < gap(before, goal)


def test_one_file_for_programs_that_take_one(edited, tmp_path):
    _, edit = edited
    done = edit.export(tmp_path / "no-dog.safetensors", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == [done.path] and done.files == {"no-dog.safetensors": done.path.stat().st_size}
    folder = edit.export(tmp_path / "folder", dtype=torch.float16).path
    assert done.path.read_bytes() == (folder / "pytorch_lora_weights.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["folder", "file.safetensors"])
def test_nothing_is_overwritten(edited, name, tmp_path):
    _, edit = edited
    edit.export(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputExistsError):
        edit.export(tmp_path / name, dtype=torch.float16)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("factor", "error"), [(1e-14, SwallowedError), (1e14, NonFiniteError)], ids=["too small", "too large"]
)
def test_what_the_dtype_cannot_hold_is_refused_before_anything_is_written(edited, factor, error, tmp_path):
    _, edit = edited
    change = {site: LowRank(part.up * factor, part.down) for site, part in edit.delta}
    with pytest.raises(error):
        Edit(edit.manifest, Delta(change)).export(tmp_path / "out", dtype=torch.float16)
    with pytest.raises(UnsupportedTensorError, match="float64"):
        edit.export(tmp_path / "out", dtype=torch.float64)
    assert list(tmp_path.iterdir()) == []
    Edit(edit.manifest, Delta(change)).export(tmp_path / "out")


def test_the_card_says_what_a_loader_will_warn_about(bases, tmp_path):
    editor = Editor(bases["sd2"])
    cards = {}
    for part in ("text", "unet"):
        edit = random_edit(editor, sites_of(editor, part), apply=False)
        cards[part] = (edit.export(tmp_path / part).path / "README.md").read_text(encoding="utf-8")
    assert "no keys for the UNet, which is right: only the text encoder is edited" in cards["text"]
    assert "no keys for the text encoder, which is right: only the UNet is edited" in cards["unet"]
    assert "pipe.text_encoder = PeftModel" in cards["text"] and "pipe.unet = PeftModel" not in cards["text"]
    assert "pipe.unet = PeftModel" in cards["unet"] and "pipe.text_encoder = PeftModel" not in cards["unet"]
    config = json.loads((tmp_path / "unet" / "unet" / "adapter_config.json").read_text(encoding="utf-8"))
    assert len(config["target_modules"]) == 8 and config["lora_alpha"] == config["r"] == 3
