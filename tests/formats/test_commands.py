"""`diffedit merge` and `diffedit export`: they do the work, say so, and say the same as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

from diffedit import Edit, Editor
from diffedit.cli import app
from tests.formats.made import denoise, embed, gap, random_edit, sites_of, tree


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*args: object):
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        document = json.loads(result.stdout) if "--json" in args else None
        return result.exit_code, document, result.stdout, result.stderr

    return run


@pytest.fixture(scope="module")
def made(bases, tmp_path_factory):
    """Two edits of one base on disk, and the model that has both."""
    root, editor = tmp_path_factory.mktemp("edits"), Editor(bases["sd1"])
    folders = [
        random_edit(editor, sites_of(editor, part), seed=seed).save(root / part)
        for seed, part in enumerate(("text", "mixed"))
    ]
    return editor, folders


def test_merge_makes_a_folder_of_a_folder(cli, bases, made):
    editor, (text, mixed) = made
    code, document, _, err = cli("merge", bases["sd1"], "--edit", text, "--edit", mixed, "-o", "merged", "--json")
    assert code == 0, err
    assert document["command"] == "merge" and document["out"] == "merged" and len(document["edits"]) == 2
    sites = sites_of(editor, "mixed")
    assert document["changed"] == sorted(f"{site.name}.weight" for site in sites)
    pipe = StableDiffusionPipeline.from_pretrained("merged")
    assert torch.equal(embed(pipe), embed(editor.pipeline)) and torch.equal(denoise(pipe), denoise(editor.pipeline))
    old, new = tree(bases["sd1"]), tree(Path("merged"))
    assert {name for name in old | new if old.get(name) != new.get(name)} == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert cli("merge", bases["sd1"], "--edit", text, "-o", "merged", "--json")[1]["error"]["code"] == "DE-504"


def test_merge_makes_a_file_of_a_file(cli, bases, checkpoints, made):
    editor, folders = made
    edits = [word for folder in folders for word in ("--edit", folder)]
    code, _, out, err = cli("merge", checkpoints["sd1"], *edits, "-o", "new.safetensors", "--config", bases["sd1"])
    assert code == 0, err
    assert "from_single_file('new.safetensors')" in out and "self_attn.out_proj.weight" in out
    assert "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight" in out
    pipe = StableDiffusionPipeline.from_single_file("new.safetensors", config=str(bases["sd1"]))
    assert gap(embed(pipe), embed(editor.pipeline)) < 1e-6 and gap(denoise(pipe), denoise(editor.pipeline)) < 1e-6
    old, new = load_file(checkpoints["sd1"]), load_file("new.safetensors")
    assert sum(not torch.equal(old[name], new[name]) for name in old) == len(sites_of(editor, "mixed"))


def test_merge_makes_a_folder_of_a_file(cli, bases, checkpoints, made):
    _, (text, _) = made
    code, _, _, err = cli("merge", checkpoints["sd1"], "--edit", text, "-o", "new", "--config", bases["sd1"])
    assert code == 0, err
    fresh = Editor(bases["sd1"])
    fresh.load(text)
    assert gap(embed(StableDiffusionPipeline.from_pretrained("new")), embed(fresh.pipeline)) < 1e-6


def test_merge_refuses_what_cannot_be(cli, bases, checkpoints, made):
    _, (text, _) = made
    Path("taken.safetensors").write_bytes(b"mine")
    cases = [
        ((bases["sd1"], "--edit", text, "-o", "new.safetensors"), "DE-100", 2),
        ((checkpoints["sd1"], "--edit", text, "-o", "taken.safetensors"), "DE-504", 2),
        ((checkpoints["sd2"], "--edit", text, "-o", "new.safetensors", "--config", bases["sd2"]), "DE-600", 1),
        ((bases["sd1"], "--edit", bases["sd2"], "-o", "new"), "DE-505", 1),
        ((bases["sd1"], "-o", "new"), "USAGE", 2),
    ]
    for args, code, status in cases:
        found, document, _, _ = cli("merge", *args, "--json")
        assert (document["error"]["code"], found) == (code, status)
    assert [path.name for path in Path().iterdir()] == ["taken.safetensors"]


@pytest.mark.parametrize("dtype", ["float16", None])
def test_export_says_what_the_precision_costs(cli, made, dtype):
    _, (_, mixed) = made
    options = ["--dtype", dtype] if dtype else []
    code, document, _, err = cli("export", mixed, "-o", "lora", *options, "--json")
    assert code == 0, err
    again = Edit.load(mixed).export("again", dtype=getattr(torch, dtype or "float32"))
    assert document["dtype"] == (dtype or "float32") and document["rounding_error"] == again.rounding
    assert document["files"] == again.files and tree(Path("lora")) == tree(Path("again"))
    code, _, out, _ = cli("export", mixed, "-o", "one.safetensors", *options)
    assert code == 0 and f"{again.rounding:.1e}" in out and Path("one.safetensors").is_file()
    assert cli("export", mixed, "-o", "lora", "--json")[1]["error"]["code"] == "DE-504"
    assert cli("export", "nowhere", "-o", "x", "--json")[1]["error"]["code"] == "DE-505"
