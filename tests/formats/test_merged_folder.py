"""Merged pipeline folders: every file and byte that no edit touches is the base's, whatever form the base has."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffedit import Editor
from diffedit.backends.saving import save_pipeline, source_folder
from diffedit.errors import (
    MalformedArtifactError,
    OutputExistsError,
    StorageError,
    SwallowedError,
    UnsupportedModelError,
    UnsupportedTensorError,
)
from tests.formats.made import PARTS, denoise, embed, gap, random_edit, sites_of, tree
from tests.tiny import build

WEIGHTS = {"text_encoder": "text_encoder/model.safetensors", "unet": "unet/diffusion_pytorch_model.safetensors"}
ENCODER, UNET = WEIGHTS.values()


@pytest.fixture
def copied(bases, tmp_path) -> Path:
    """A base of our own to change: SD 1.x."""
    return Path(shutil.copytree(bases["sd1"], tmp_path / "base"))


def changed(base: Path, merged: Path) -> set[str]:
    old, new = tree(base), tree(merged)
    return {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}


def check_bytes(one: Path, other: Path, spans: Sequence[range]) -> None:
    """Bytes differ in every one of the spans, and nowhere else."""
    data = [np.frombuffer(path.read_bytes(), np.uint8) for path in (one, other)]
    assert len(data[0]) == len(data[1])
    differ = data[0] != data[1]
    for span in spans:
        assert differ[span.start : span.stop].any()
        differ[span.start : span.stop] = False
    assert not differ.any()


def places(file: Path) -> dict[str, range]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {name: range(*(8 + length + at for at in entry["data_offsets"])) for name, entry in header.items()}


def rewrite(file: Path, change, metadata: bool = True) -> None:
    """Store the tensors as `change(name, tensor)` gives them."""
    tensors = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"} if metadata else None)


@pytest.mark.parametrize("part", PARTS)
def test_only_the_edited_tensors_bytes_differ(base, part, tmp_path):
    editor = Editor(base)
    edit = random_edit(editor, sites_of(editor, part))
    merged = editor.save_pipeline(tmp_path / "merged")
    components = {site.component for site in edit.delta.sites}
    assert changed(base, merged) == {WEIGHTS[component] for component in components}
    for component in components:
        file = WEIGHTS[component]
        spans = places(base / file)
        edited = [spans[f"{site.path}.weight"] for site in edit.delta.sites if site.component == component]
        check_bytes(base / file, merged / file, edited)
    pipe = StableDiffusionPipeline.from_pretrained(merged)
    assert torch.equal(embed(pipe), embed(editor.pipeline)) and torch.equal(denoise(pipe), denoise(editor.pipeline))
    plain = StableDiffusionPipeline.from_pretrained(base)
    assert gap(denoise(pipe), denoise(plain)) > 1e-2  # control
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_an_unedited_model_is_copied_whole(base, tmp_path):
    editor = Editor(base)
    random_edit(editor, sites_of(editor, "mixed")).revert()
    assert tree(editor.save_pipeline(tmp_path / "merged")) == tree(base)


def test_an_edit_survives_the_round_trip_through_the_merged_folder(base, tmp_path):
    """What is merged is what the ledger wrote: loading the edit onto it says that it is in already."""
    editor = Editor(base)
    edit = random_edit(editor, sites_of(editor, "mixed"))
    again = Editor(editor.save_pipeline(tmp_path / "merged"))
    for site in edit.delta.sites:
        assert torch.equal(again.backend.weight(site), editor.backend.weight(site))


def test_a_half_precision_base_keeps_its_precision(copied, tmp_path):
    """Loaded in float32, edited, and stored as it was: float16, names, metadata, and all untouched bytes."""
    for file in WEIGHTS.values():
        rewrite(copied / file, lambda name, tensor: tensor.half())
    editor = Editor(copied)
    edit = random_edit(editor, sites_of(editor, "mixed"))
    merged = editor.save_pipeline(tmp_path / "merged")
    assert changed(copied, merged) == set(WEIGHTS.values())
    edited = {f"{site.path}.weight": site for site in edit.delta.sites}
    for file in WEIGHTS.values():
        old, new = load_file(copied / file), load_file(merged / file)
        for name in old:
            if name in edited:
                assert torch.equal(new[name], editor.backend.weight(edited[name]).detach().half())
            else:
                assert torch.equal(new[name], old[name])


def test_a_half_precision_copy_of_the_model_leaves_a_full_precision_base_alone(base, tmp_path):
    editor = Editor(base, dtype=torch.float16)
    edit = random_edit(editor, sites_of(editor, "text"))
    merged = editor.save_pipeline(tmp_path / "merged")
    assert changed(base, merged) == {ENCODER}
    old, new = load_file(base / ENCODER), load_file(merged / ENCODER)
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        f"{site.path}.weight" for site in edit.delta.sites
    }
    for site in edit.delta.sites:
        assert torch.equal(new[f"{site.path}.weight"], editor.backend.weight(site).detach().float())


def test_an_edit_that_the_files_dtype_swallows_is_refused(copied, tmp_path):
    rewrite(copied / ENCODER, lambda name, tensor: tensor.bfloat16())
    editor = Editor(copied)
    random_edit(editor, sites_of(editor, "text"), size=1e-5)
    with pytest.raises(SwallowedError, match="bfloat16"):
        editor.save_pipeline(tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_variant_gets_the_same_edit(copied, tmp_path):
    """`variant="fp16"` must not bring the unedited weights back."""
    shutil.copyfile(copied / ENCODER, copied / "text_encoder" / "model.fp16.safetensors")
    rewrite(copied / "text_encoder" / "model.fp16.safetensors", lambda name, tensor: tensor.half())
    editor = Editor(copied)
    edit = random_edit(editor, sites_of(editor, "text"))
    merged = editor.save_pipeline(tmp_path / "merged")
    assert changed(copied, merged) == {ENCODER, "text_encoder/model.fp16.safetensors"}
    old, new = (load_file(folder / "text_encoder" / "model.fp16.safetensors") for folder in (copied, merged))
    for name in old:
        site = next((site for site in edit.delta.sites if name == f"{site.path}.weight"), None)
        wanted = old[name] if site is None else editor.backend.weight(site).detach().half()
        assert torch.equal(new[name], wanted)


def test_weights_that_are_not_the_models_are_left_out(copied, tmp_path, caplog):
    """An EMA copy, a pickle, a single file beside the folder: each would load without the edit."""
    other = copied / "unet" / "diffusion_pytorch_model.non_ema.safetensors"
    shutil.copyfile(copied / UNET, other)
    rewrite(other, lambda name, tensor: tensor + 1)
    (copied / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    (copied / "whole.safetensors").write_bytes(b"anything")
    (copied / ".git").mkdir()
    (copied / ".git" / "HEAD").write_text("ref\n", encoding="utf-8")
    editor = Editor(copied)
    random_edit(editor, sites_of(editor, "unet"))
    with caplog.at_level(logging.WARNING, "diffedit"):
        merged = editor.save_pipeline(tmp_path / "merged")
    gone = {"unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.safetensors"}
    assert changed(copied, merged) == {UNET, "whole.safetensors", ".git/HEAD", *gone}
    assert not any((merged / name).exists() for name in gone)
    assert all(name in caplog.text for name in gone)


def shard(folder: Path, file: str, parts: int) -> dict[str, str]:
    """Split a weight file as the libraries do."""
    tensors = load_file(folder / file)
    stem = Path(file).stem
    names = sorted(tensors)
    index = {}
    for number in range(parts):
        target = f"{stem}-{number + 1:05d}-of-{parts:05d}.safetensors"
        mine = names[number::parts]
        save_file({name: tensors[name] for name in mine}, folder / target, {"format": "pt"})
        index |= {name: target for name in mine}
    document = {"metadata": {"total_size": 1}, "weight_map": index}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / file).unlink()
    return index


@pytest.mark.parametrize("part", ["text", "unet"])
def test_sharded_weights_stay_in_their_shards(copied, part, tmp_path):
    component = "text_encoder" if part == "text" else "unet"
    index = shard(copied / component, Path(WEIGHTS[component]).name, 3)
    editor = Editor(copied)
    edit = random_edit(editor, sites_of(editor, part)[:1])
    merged = editor.save_pipeline(tmp_path / "merged")
    (site,) = edit.delta.sites
    assert changed(copied, merged) == {f"{component}/{index[f'{site.path}.weight']}"}
    pipe = StableDiffusionPipeline.from_pretrained(merged)
    assert torch.equal(denoise(pipe), denoise(editor.pipeline))


def test_flat_names_and_a_new_tokenizer_are_made_readable_for_old_libraries(sd1, tmp_path):
    """A base that transformers 5 wrote from memory: its text encoder's names and its tokenizer are unknown to 4.x."""
    sd1.save_pretrained(tmp_path / "base")
    before = load_file(tmp_path / "base" / ENCODER)
    assert not any(name.startswith("text_model.") for name in before)
    assert not (tmp_path / "base" / "tokenizer" / "vocab.json").exists()
    editor = Editor(tmp_path / "base")
    merged = editor.save_pipeline(tmp_path / "plain")
    assert changed(tmp_path / "base", merged) == {ENCODER, "tokenizer/vocab.json", "tokenizer/merges.txt"}
    after = load_file(merged / ENCODER)
    assert after.keys() == {f"text_model.{name}" for name in before}
    assert all(torch.equal(after[f"text_model.{name}"], before[name]) for name in before)
    with safe_open(merged / ENCODER, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    random_edit(editor, sites_of(editor, "text"))
    pipe = StableDiffusionPipeline.from_pretrained(editor.save_pipeline(tmp_path / "edited"))
    assert torch.equal(embed(pipe), embed(editor.pipeline))


def test_flat_names_in_shards(sd1, tmp_path):
    sd1.save_pretrained(tmp_path / "base")
    shard(tmp_path / "base" / "text_encoder", "model.safetensors", 2)
    editor = Editor(tmp_path / "base")
    random_edit(editor, sites_of(editor, "text"))
    merged = editor.save_pipeline(tmp_path / "merged")
    index = json.loads((merged / "text_encoder" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    for name, file in index["weight_map"].items():
        assert name.startswith("text_model.") and name in places(merged / "text_encoder" / file)
    pipe = StableDiffusionPipeline.from_pretrained(merged)
    assert torch.equal(embed(pipe), embed(editor.pipeline))


def test_old_names_in_a_vae_do_not_stop_the_copy(copied, tmp_path):
    """Published VAEs still call their attention layers `query`, `key`, `value`, `proj_attn`."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = copied / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for new, name in old.items():
        for key in [key for key in tensors if f".attentions.0.{new}." in key]:
            tensors[key.replace(f".{new}.", f".{name}.")] = tensors.pop(key)
    assert any(".query." in name for name in tensors)
    save_file(tensors, file, {"format": "pt"})
    editor = Editor(copied)
    random_edit(editor, sites_of(editor, "unet"))
    assert changed(copied, editor.save_pipeline(tmp_path / "merged")) == {UNET}


def test_other_parts_that_changed_in_memory_are_not_lost(base, tmp_path):
    editor = Editor(base)
    random_edit(editor, sites_of(editor, "text"))
    pipe = editor.pipeline
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight += 1.0
        pipe.unet.conv_in.bias += 1.0
    merged = editor.save_pipeline(tmp_path / "merged")
    vae = "vae/diffusion_pytorch_model.safetensors"
    scheduler = "scheduler/scheduler_config.json"
    assert changed(base, merged) == {ENCODER, UNET, vae, scheduler, "model_index.json"}
    again = StableDiffusionPipeline.from_pretrained(merged)
    assert type(again.scheduler) is DPMSolverMultistepScheduler
    assert torch.equal(again.vae.decoder.conv_in.weight, pipe.vae.decoder.conv_in.weight)
    assert torch.equal(denoise(again), denoise(pipe))
    old, new = load_file(base / UNET), load_file(merged / UNET)
    assert [name for name in old if not torch.equal(old[name], new[name])] == ["conv_in.bias"]


def test_new_tokens_are_not_lost(base, tmp_path):
    editor = Editor(base)
    editor.pipeline.tokenizer.add_tokens(["<mine>"])
    editor.pipeline.text_encoder.resize_token_embeddings(len(editor.pipeline.tokenizer))
    again = StableDiffusionPipeline.from_pretrained(editor.save_pipeline(tmp_path / "merged"))
    assert again.tokenizer.convert_tokens_to_ids("<mine>") == len(editor.pipeline.tokenizer) - 1
    assert all(name.startswith("text_model.") for name in load_file(tmp_path / "merged" / ENCODER))
    assert torch.equal(embed(again), embed(editor.pipeline))


def test_a_part_that_the_live_pipeline_lacks_is_left_out(copied, tmp_path):
    """The base has a feature extractor; the live pipeline was loaded without it."""
    from transformers import CLIPImageProcessor

    CLIPImageProcessor().save_pretrained(copied / "feature_extractor")
    index = json.loads((copied / "model_index.json").read_text(encoding="utf-8"))
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (copied / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    merged = Editor(copied).save_pipeline(tmp_path / "whole")
    assert changed(copied, merged) == set()
    pipe = StableDiffusionPipeline.from_pretrained(copied, feature_extractor=None)
    merged = save_pipeline(pipe, tmp_path / "merged")
    assert not (merged / "feature_extractor").exists()
    assert StableDiffusionPipeline.from_pretrained(merged).feature_extractor is None


def test_the_hubs_cache_is_a_source_and_its_links_become_files(bases, tmp_path):
    """A snapshot holds links to blobs; a user's own pipeline knows only the id, its parts know the snapshot."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("a" * 40)
    blobs.mkdir()
    for name, digest in tree(bases["sd1"]).items():
        shutil.copyfile(bases["sd1"] / name, blobs / digest)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / digest, (snapshot / name).parent))
    pipe = StableDiffusionPipeline.from_pretrained(snapshot)
    pipe.register_to_config(_name_or_path="somebody/model")
    assert source_folder(pipe) == snapshot
    editor = Editor(pipe)
    random_edit(editor, sites_of(editor, "text"))
    merged = editor.save_pipeline(tmp_path / "merged")
    assert changed(snapshot, merged) == {ENCODER}
    assert not any(path.is_symlink() for path in merged.rglob("*"))


def test_a_pipeline_from_memory_is_written_whole(tokenizer_folder, family, tmp_path):
    pipe = build.pipeline(tokenizer_folder, family=family)
    assert source_folder(pipe) is None
    editor = Editor(pipe)
    random_edit(editor, sites_of(editor, "mixed"))
    merged = editor.save_pipeline(tmp_path / "merged")
    assert all(name.startswith("text_model.") for name in load_file(merged / ENCODER))
    again = StableDiffusionPipeline.from_pretrained(merged)
    assert torch.equal(embed(again), embed(pipe)) and torch.equal(denoise(again), denoise(pipe))


def test_active_adapters_are_refused(base, tmp_path):
    from peft import LoraConfig

    editor = Editor(base)
    editor.pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_k"]))
    with pytest.raises(UnsupportedTensorError, match=r"adapter.*unet.*unload_lora_weights"):
        editor.save_pipeline(tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_half_a_pipeline_is_refused(base, tmp_path):
    editor = Editor(base)
    editor.pipeline.vae = None
    with pytest.raises(UnsupportedModelError, match="no vae"):
        editor.save_pipeline(tmp_path / "merged")


def test_a_damaged_base_is_an_error_and_leaves_nothing(copied, tmp_path):
    editor = Editor(copied)
    assert editor.pipeline.unet is not None  # read, and then no longer what is on the disk
    file = copied / UNET
    data = file.read_bytes()
    file.unlink()  # the old bytes stay mapped in the live model
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(MalformedArtifactError, match="place does not fit"):
        editor.save_pipeline(tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_nothing_is_overwritten_silently(base, tmp_path):
    editor = Editor(base)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    for name in ("file", "other", "link"):
        for overwrite in (False, True):
            with pytest.raises(OutputExistsError):
                editor.save_pipeline(tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "other" / "thesis.txt").read_text(encoding="utf-8") == "mine"
    assert tree(editor.save_pipeline(tmp_path / "empty")) == tree(base)
    with pytest.raises(OutputExistsError, match="allow overwriting"):
        editor.save_pipeline(tmp_path / "empty")
    random_edit(editor, sites_of(editor, "text"))
    assert changed(base, editor.save_pipeline(tmp_path / "empty", overwrite=True)) == {ENCODER}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "link", "other"]


def test_a_model_can_be_merged_over_its_own_folder(copied):
    editor = Editor(copied)
    edit = random_edit(editor, sites_of(editor, "mixed"))
    before, wanted = tree(copied), denoise(editor.pipeline)
    editor.save_pipeline(copied, overwrite=True)
    assert torch.equal(denoise(StableDiffusionPipeline.from_pretrained(copied)), wanted)
    edit.revert()
    editor.save_pipeline(copied, overwrite=True)
    assert tree(copied) == before


@pytest.mark.parametrize("call", ["copyfile", "fsync", "rename"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failing_disk_leaves_what_was_there(bases, call, overwrite, tmp_path, monkeypatch):
    editor, target = Editor(bases["sd1"]), tmp_path / "merged"
    if overwrite:
        editor.save_pipeline(target)
    random_edit(editor, sites_of(editor, "text"))
    before = tree(tmp_path)
    owner = shutil if call == "copyfile" else os
    real, calls = getattr(owner, call), []

    def count(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, count)
        editor.save_pipeline(tmp_path / "trial")
    shutil.rmtree(tmp_path / "trial")
    for doomed in sorted({0, len(calls) // 2, len(calls) - 1}):
        seen = []

        def fail(*args, seen=seen, doomed=doomed, **kwargs):
            seen.append(args)
            if len(seen) == doomed + 1:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, call, fail)
            with pytest.raises(StorageError, match="No space left"):
                editor.save_pipeline(target, overwrite=overwrite)
        assert tree(tmp_path) == before


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from diffedit import Editor
real, left = os.fsync, [int(sys.argv[4])]
def fsync(descriptor):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), 9)
    real(descriptor)
os.fsync = fsync
Editor(sys.argv[2]).save_pipeline(sys.argv[3])
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_no_model_and_the_next_one_sweeps(bases, tmp_path):
    base = bases["sd1"]
    root = str(Path(__file__).parents[2])
    script = [sys.executable, "-c", KILLED, root, str(base), str(tmp_path / "merged"), "4"]
    run = subprocess.run(script, capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not (tmp_path / "merged").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".diffedit-") and left.name.endswith(".tmp")
    merged = Editor(base).save_pipeline(tmp_path / "merged")
    assert tree(merged) == tree(base) and list(tmp_path.iterdir()) == [merged]
