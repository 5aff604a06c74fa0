"""A saved edit passes every check; each single thing that is wrong with a folder or a base fails its own check."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import diffedit
from diffedit import Edit, Editor, verify
from diffedit.errors import ModelNotFoundError, RequestError
from diffedit.testing import unchanged
from tests.formats.made import random_edit, sites_of, tree
from tests.unit.io.conftest import forge_manifest, split_file

KOHYA, PEFT, CONFIG = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory) -> dict[str, Path]:
    """Edits by family and by where they are: an ablation, and random ones of text encoder and UNet."""
    root, out = tmp_path_factory.mktemp("edits"), {}
    for family, folder in folders.items():
        editor = Editor(folder)
        out[family] = editor.ablate("dog", target="cat").save(root / family / "ablation")
        editor.revert()
        for part in ("unet", "mixed"):
            edit = random_edit(editor, sites_of(editor, part), apply=False)
            out[f"{family} {part}"] = edit.save(root / family / part)
    return out


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the ablation's folder, to damage."""
    return Path(shutil.copytree(saved["sd1"], tmp_path / "edit"))


def outcomes(found) -> dict[str, str]:
    return {check.name: check.outcome for check in found.checks}


def detail(found, name: str) -> str:
    return next(check.detail for check in found.checks if check.name == name)


@pytest.mark.parametrize("which", ["sd1", "sd1 unet", "sd1 mixed", "sd2", "sd2 unet", "sd2 mixed"])
def test_a_fresh_edit_passes_everything_on_its_base(saved, folders, which):
    before = tree(saved[which]), tree(folders[which[:3]])
    found = verify(saved[which], folders[which[:3]])
    assert set(outcomes(found).values()) == {"pass"}, found.summary()
    assert found.ok and not found.failed and not found.unverified
    assert found.edit_id == Edit.load(saved[which]).id and found.base == which[:3]
    names = set(outcomes(found))
    assert {"edit.safetensors", "files", KOHYA, "README.md", "base: architecture", "base: tokenizer", "result"} <= names
    assert ("unet/" + PEFT in names) == ("unet" in which or "mixed" in which)
    assert (PEFT in names) == ("unet" not in which)
    assert (tree(saved[which]), tree(folders[which[:3]])) == before


def test_without_a_base_the_rest_is_checked_and_the_base_is_said_to_be_skipped(folder):
    found = verify(folder)
    assert found.ok and outcomes(found)["base"] == outcomes(found)["result"] == "skipped" and found.base is None
    assert {check.name for check in found.unverified} == {"base", "result"}


@pytest.mark.parametrize("file", ["edit.safetensors", "pairs.safetensors", KOHYA, PEFT])
def test_a_changed_number_fails(folder, file):
    path = folder / file
    data = bytearray(path.read_bytes())
    data[-2] ^= 0x40  # in the last number: a large change of one factor
    path.write_bytes(data)
    found = verify(folder)
    assert not found.ok and {check.name for check in found.failed} == {file}


@pytest.mark.parametrize("file", ["edit.safetensors", "pairs.safetensors", KOHYA, PEFT, CONFIG])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_truncated_file_fails(folder, file, kept):
    path = folder / file
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert not verify(folder).ok


def test_an_edit_that_cannot_be_read_is_a_failed_check_and_no_error(folder, base):
    (folder / "edit.safetensors").write_bytes(b"\x80\x02.")
    found = verify(folder, base)
    assert [check.name for check in found.failed] == ["edit.safetensors"] and found.edit_id is None
    (folder / "edit.safetensors").unlink()
    assert not verify(folder).ok


@pytest.mark.parametrize("file", [KOHYA, PEFT, CONFIG, "README.md", "pairs.safetensors"])
def test_a_missing_file_fails(folder, file):
    (folder / file).unlink()
    found = verify(folder)
    assert not found.ok and f"missing: {file}" in detail(found, "files")


@pytest.mark.parametrize("name", ["model.bin", "run.py", "unet/adapter_model.safetensors", ".hidden", "sub/notes.txt"])
def test_a_superfluous_file_fails(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    found = verify(folder)
    assert [check.name for check in found.failed] == ["files"] and name in detail(found, "files")


def test_a_preview_and_the_hubs_own_file_may_lie_there_and_are_said_to_be_unchecked(folder):
    (folder / "before_after.png").write_bytes(b"x")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    found = verify(folder)
    assert found.ok and "before_after.png is the preview, not checked" in detail(found, "files")


def test_a_changed_card_is_reported_and_is_no_failure(folder):
    with open(folder / "README.md", "a", encoding="utf-8") as card:
        card.write("Also removes violence, guaranteed.\n")
    found = verify(folder)
    assert found.ok and outcomes(found)["README.md"] == "changed"
    assert "README.md" in {check.name for check in found.unverified}


def resave(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def test_an_adapter_that_another_program_wrote_passes_if_it_holds_the_same_change(folder):
    def rotate(tensors):
        for name in [name for name in tensors if name.endswith("lora_up.weight")]:
            tensors[name] = (tensors[name] * 4.0).contiguous()
            tensors[name.replace("up", "down")] = (tensors[name.replace("up", "down")] / 4.0).contiguous()

    resave(folder / KOHYA, rotate)
    found = verify(folder)
    assert outcomes(found)[KOHYA] == "pass" and "another version or program" in detail(found, KOHYA)


def test_a_half_precision_adapter_passes_within_its_rounding_and_not_beyond(folder):
    resave(folder / KOHYA, lambda t: t.update({k: v.half() for k, v in t.items() if not k.endswith("alpha")}))
    found = verify(folder)
    assert outcomes(found)[KOHYA] == "pass" and "F16" in detail(found, KOHYA)
    resave(folder / KOHYA, lambda t: t.update({k: v * 1.01 for k, v in t.items() if k.endswith("up.weight")}))
    assert outcomes(verify(folder))[KOHYA] == "fail"


def scaled_alpha(tensors):
    for name in [name for name in tensors if name.endswith("alpha")]:
        tensors[name] = tensors[name] * 0.5


def slightly_off(tensors):
    name = next(name for name in sorted(tensors) if name.endswith(("lora_up.weight", "lora_B.weight")))
    tensors[name] = tensors[name] * (1 + 1e-4)


def foreign_module(tensors):
    for name in list(tensors):
        tensors[name.replace("layers_0", "layers_1")] = tensors[name].clone()


def stray_tensor(tensors):
    tensors["stray"] = torch.zeros(1)


def missing_half(tensors):
    del tensors[next(name for name in tensors if name.endswith(("lora_down.weight", "lora_A.weight")))]


def not_finite(tensors):
    name = next(name for name in tensors if name.endswith(("lora_up.weight", "lora_B.weight")))
    tensors[name][0, 0] = float("nan")


@pytest.mark.parametrize(
    "change",
    [scaled_alpha, slightly_off, foreign_module, stray_tensor, missing_half, not_finite],
    ids=lambda f: f.__name__,
)
def test_a_kohya_file_with_another_change_fails(folder, change):
    resave(folder / KOHYA, change)
    found = verify(folder)
    assert [check.name for check in found.failed] == [KOHYA], found.summary()


@pytest.mark.parametrize("change", [slightly_off, stray_tensor, missing_half, not_finite], ids=lambda f: f.__name__)
def test_a_peft_file_with_another_change_fails(folder, change):
    """`slightly_off` changes the flat copy alone, which only some versions of transformers would load."""
    resave(folder / PEFT, change)
    assert [check.name for check in verify(folder).failed] == [PEFT]


@pytest.mark.parametrize("change", [{"lora_alpha": 3}, {"r": 1}, {"target_modules": []}, {"use_rslora": True}])
def test_a_peft_configuration_that_means_something_else_fails(folder, change):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **change}))
    assert [check.name for check in verify(folder).failed] == [PEFT]


def test_harmless_words_in_a_peft_configuration_pass(folder):
    config = json.loads((folder / CONFIG).read_text())
    more = {"base_model_name_or_path": "me/model", "peft_version": "0.21", "use_rslora": False, "modules_to_save": None}
    (folder / CONFIG).write_text(json.dumps({**config, **more}))
    assert verify(folder).ok


def test_the_zero_companions_of_sd2_may_not_hold_a_change(saved, tmp_path):
    folder = Path(shutil.copytree(saved["sd2"], tmp_path / "edit"))
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_"

    def fill(tensors):
        for part in ("up", "down"):
            tensors[f"{name}{part}.weight"] += 0.1

    assert name + "up.weight" in load_file(folder / KOHYA)
    resave(folder / KOHYA, fill)
    assert [check.name for check in verify(folder).failed] == [KOHYA]


def test_another_model_of_the_same_shape_fails(folder, base, edited):
    def change(tensors):
        tensors["text_model.encoder.layers.0.self_attn.out_proj.weight"] += 1e-4

    found = verify(folder, edited(base, change=change))
    (failed,) = found.failed
    assert failed.name.startswith("base: text_encoder.") and failed.detail.startswith("mismatch")
    assert outcomes(found)["result"] == "skipped"


def test_a_model_of_another_family_fails(folder, folders):
    found = verify(folder, folders["sd2"])
    assert {check.name for check in found.failed} == {"base: architecture", "base: tokenizer"}


def test_a_base_that_carries_the_edit_already_is_recognised(folder, base, tmp_path):
    editor = Editor(base)
    editor.load(folder)
    editor.save_pipeline(tmp_path / "merged")
    (failed,) = verify(folder, tmp_path / "merged").failed
    assert "already" in failed.detail


def test_a_half_precision_copy_of_the_base_is_recognised(folder, base, tmp_path):
    copy = tmp_path / "half"
    StableDiffusionPipeline.from_pretrained(base, dtype=torch.float16).save_pretrained(copy)
    for model in (copy, StableDiffusionPipeline.from_pretrained(base, dtype=torch.float16)):
        found = verify(folder, model)
        assert found.ok, found.summary()
        (weight,) = [check for check in found.checks if check.name.startswith("base: text_encoder")]
        assert weight.detail == "half-precision copy (float16)" and weight.outcome == "pass"
        assert outcomes(found)["result"] == "skipped" and "recorded for float32" in detail(found, "result")


def test_a_base_that_is_given_live_stays_as_it_is(folder, base):
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    with unchanged(pipeline, "verify"):
        assert verify(folder, pipeline).ok


def test_a_result_that_was_recorded_wrongly_fails(folder, base):
    path = folder / "edit.safetensors"
    header, _ = split_file(path.read_bytes())
    content = json.loads(header["__metadata__"]["diffedit"])["manifest"]
    content["sites"][0]["result_sha256"] = "0" * 64
    path.write_bytes(forge_manifest(path.read_bytes(), content))
    found = verify(folder, base)
    assert {check.name for check in found.failed} >= {"result"} and "other weights than recorded" in detail(
        found, "result"
    )


def test_a_composed_edit_has_no_recorded_result_and_says_so(folder, base, tmp_path):
    half = Edit.load(folder) * 0.5
    assert half.manifest.sites[0].result_sha256 is None
    found = verify(half.save(tmp_path / "half"), base)
    assert found.ok and outcomes(found)["result"] == "skipped" and "nothing recorded" in detail(found, "result")


def test_the_single_file_of_the_base_will_do(saved, files, folders, family):
    assert verify(saved[family], files[family], config=str(folders[family])).ok


def test_what_is_no_folder_is_a_usage_error(folder, tmp_path):
    for odd in (tmp_path / "nothing", folder / "edit.safetensors", None, "a\0b"):
        with pytest.raises(RequestError):
            verify(odd)


def test_a_base_that_is_not_there_is_an_error(folder):
    with pytest.raises(ModelNotFoundError):
        verify(folder, "nothing/../here")


def test_a_named_pipe_in_the_folder_does_not_block(folder):
    (folder / "README.md").unlink()
    os.mkfifo(folder / "README.md")
    assert [check.name for check in verify(folder).failed] == ["README.md"]


def test_links_to_the_files_are_followed_as_in_the_hubs_cache(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert verify(linked).ok


def test_the_outcome_is_frozen_and_turns_into_json(folder):
    found = verify(folder)
    assert diffedit.Verification.model_validate_json(found.model_dump_json()) == found
    assert len(found.summary().splitlines()) == len(found.checks)
    with pytest.raises(ValueError, match="frozen"):
        found.edit_id = None
