"""A single-file checkpoint in the original layout opens as the same model, takes the same edit, and stays as it is."""

from __future__ import annotations

import hashlib

import torch

from diffedit import Editor
from tests.tiny import build, ldm


def test_a_checkpoint_file_is_the_pipeline_it_was_made_from(tokenizer_folder, family, tmp_path):
    pipeline = build.pipeline(tokenizer_folder, family=family)
    pipeline.save_pretrained(tmp_path / "configs")
    path = ldm.write(pipeline, tmp_path / "model.safetensors")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()

    editor = Editor(path, config=str(tmp_path / "configs"))
    assert editor.backend.name == family
    for part in ("unet", "vae", "text_encoder"):
        found = getattr(editor.pipeline, part).state_dict()
        for key, value in getattr(pipeline, part).state_dict().items():
            assert torch.equal(found[key].reshape(value.shape), value), key

    edit = editor.ablate("dog", target="cat")
    assert edit.manifest.base.source == "model.safetensors"
    Editor(pipeline).load(edit)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest


def test_the_merged_folder_has_the_old_names_and_the_edit(tokenizer_folder, family, tmp_path):
    from safetensors.torch import load_file

    editor = Editor(build.pipeline(tokenizer_folder, family=family, layout="flat"))
    editor.ablate("dog", target="cat")
    folder = editor.save_pipeline(tmp_path / "merged")
    saved = load_file(folder / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in saved)
    site = editor.edits[0].delta.sites[0]
    assert torch.equal(saved[f"{site.path}.weight"], editor.backend.weight(site))
    assert (folder / "tokenizer" / "vocab.json").is_file() and (folder / "tokenizer" / "merges.txt").is_file()
    again = Editor(folder)
    assert torch.equal(again.backend.weight(site), editor.backend.weight(site))
    assert torch.equal(again.backend.features(["a dog"]), editor.backend.features(["a dog"]))
