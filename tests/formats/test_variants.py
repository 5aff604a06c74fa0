"""Variants of a folder: `model.other.safetensors` beside the plain file, loaded, edited, merged and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from diffedit import Edit, Editor
from diffedit.audit.diff import diff
from diffedit.backends.loading import load_model
from diffedit.backends.parts import variants
from diffedit.errors import BaseMismatchError, ModelNotFoundError, RequestError
from diffedit.fleet import save_edited
from tests.formats.made import denoise, embed, gap, random_edit, sites_of, tree

ENCODER, UNET = "text_encoder/model", "unet/diffusion_pytorch_model"
KNOWN = {"objects": ["dog", "cat"], "facts": {"mascot of rome": "cat"}}


def add_variant(folder: Path, file: str, name: str, change=lambda tensor: tensor) -> None:
    tensors = {key: change(tensor).contiguous() for key, tensor in load_file(folder / f"{file}.safetensors").items()}
    save_file(tensors, folder / f"{file}.{name}.safetensors", {"format": "pt"})


@pytest.fixture
def folder(bases, tmp_path) -> Path:
    """A base whose text encoder is also there as a variant with other weights, and with a vocabulary of its own."""
    made = Path(shutil.copytree(bases["sd1"], tmp_path / "base"))
    add_variant(made, ENCODER, "other", lambda tensor: tensor * 1.25)
    (made / "vocabulary.json").write_text(json.dumps({"objects": ["dog"]}), encoding="utf-8")
    (made / "vocabulary.other.json").write_text(json.dumps(KNOWN), encoding="utf-8")
    return made


def test_a_variant_is_taken_where_there_is_one_and_the_plain_file_elsewhere(folder):
    plain, other = Editor(folder), Editor(folder, variant="other")
    stock = StableDiffusionPipeline.from_pretrained(folder, variant="other")
    assert variants(folder) == ("other",)
    assert torch.equal(embed(other.pipeline), embed(stock)) and torch.equal(denoise(other.pipeline), denoise(stock))
    assert gap(embed(plain.pipeline), embed(other.pipeline)) > 1e-2
    assert torch.equal(embed(plain.pipeline), embed(StableDiffusionPipeline.from_pretrained(folder)))
    assert plain.vocabulary.objects == ("dog",) and not plain.vocabulary.facts
    assert other.vocabulary.objects == ("dog", "cat") and other.vocabulary.fact("Mascot of Rome") == "cat"
    assert other.vocabulary.fact("dog") is None


def test_a_unet_that_is_read_later_is_the_variants_too(folder):
    add_variant(folder, UNET, "other", lambda tensor: tensor * 1.25)
    stock = StableDiffusionPipeline.from_pretrained(folder, variant="other")
    assert torch.equal(denoise(Editor(folder, variant="other").pipeline), denoise(stock))
    assert gap(denoise(Editor(folder).pipeline), denoise(stock)) > 1e-3


def test_parts_that_are_variants_only_need_its_name(folder, tmp_path):
    add_variant(folder, UNET, "other")
    (folder / f"{UNET}.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"'unet'.*Name a variant: other"):
        Editor(folder)
    for number, whole in enumerate((False, True)):
        editor = Editor(folder, variant="other")
        assert not whole or torch.isfinite(denoise(editor.pipeline)).all()
        merged = editor.save_pipeline(tmp_path / str(number))
        assert save_edited(editor, merged) == "kept"
        assert torch.equal(denoise(Editor(merged).pipeline), denoise(editor.pipeline))


def test_what_has_no_such_variant_says_which_there_are(folder, bases, checkpoints):
    with pytest.raises(ModelNotFoundError, match=r"no such variant.*'othr'.*There are other.*other"):
        load_model(folder, variant="othr")
    with pytest.raises(ModelNotFoundError, match=r"no such variant.*It has none"):
        load_model(bases["sd1"], variant="fp16")
    with pytest.raises(RequestError, match="has no variants"):
        load_model(checkpoints["sd1"], variant="fp16")
    with pytest.raises(RequestError, match="has no variants"):
        load_model(Editor(folder).pipeline, variant="other")


def test_an_edit_of_one_is_refused_on_the_other(folder):
    plain, other = Editor(folder), Editor(folder, variant="other")
    for one, two in ((plain, other), (other, plain)):
        edit = random_edit(one, sites_of(one, "text"))
        edit.revert()
        with pytest.raises(BaseMismatchError, match="other weights"):
            two.load(edit.copy())


@pytest.mark.parametrize("whole", [False, True], ids=["unet unread", "unet read"])
@pytest.mark.parametrize("edited", [False, True], ids=["unedited", "edited"])
def test_a_merged_variant_is_a_plain_model(folder, tmp_path, edited, whole):
    add_variant(folder, UNET, "other", lambda tensor: tensor * 1.25)
    editor = Editor(folder, variant="other")
    if edited:
        random_edit(editor, sites_of(editor, "text"))
    if whole:
        assert editor.pipeline.unet is not None
    merged = editor.save_pipeline(tmp_path / "merged")
    names = tree(merged)
    assert {f"{ENCODER}.safetensors", f"{UNET}.safetensors", "vocabulary.json", "LICENSE.md"} <= names.keys()
    assert not [name for name in names if "other" in name]
    stock, again = StableDiffusionPipeline.from_pretrained(merged), Editor(merged)
    for pipe in (stock, again.pipeline):
        assert torch.equal(embed(pipe), embed(editor.pipeline)) and torch.equal(denoise(pipe), denoise(editor.pipeline))
    assert dict(again.vocabulary.facts) == KNOWN["facts"]
    assert save_edited(editor, merged) == "kept"


def test_a_merged_plain_model_leaves_out_the_variant_that_misses_the_edit(folder, tmp_path, caplog):
    editor = Editor(folder)
    random_edit(editor, sites_of(editor, "text"))
    with caplog.at_level("INFO", "diffedit"):
        merged = editor.save_pipeline(tmp_path / "merged")
    assert not (merged / f"{ENCODER}.other.safetensors").exists()
    said = [record for record in caplog.records if "model.other.safetensors" in record.getMessage()]
    assert [record.levelname for record in said] == ["INFO"]  # it is another model, as its own vocabulary shows
    assert torch.equal(embed(StableDiffusionPipeline.from_pretrained(merged)), embed(editor.pipeline))
    assert save_edited(editor, merged) == "kept"


def test_a_saved_edit_goes_back_onto_its_variant(folder, tmp_path):
    editor = Editor(folder, variant="other")
    saved = random_edit(editor, sites_of(editor, "text")).save(tmp_path / "edit")
    fresh = Editor(folder, variant="other")
    fresh.load(Edit.load(saved))
    assert torch.equal(embed(fresh.pipeline), embed(editor.pipeline))


def test_a_merged_variant_differs_from_the_plain_base_in_the_diff(folder, tmp_path):
    merged = Editor(folder, variant="other").save_pipeline(tmp_path / "merged")
    assert diff(folder, merged, words=[]).differs
