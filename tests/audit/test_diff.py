"""Two models on disk: planted edits are found and named, copies are not, and nothing is passed over in silence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffedit
from diffedit import Editor, diff
from diffedit.backends.checkpoint import save_checkpoint
from diffedit.errors import (
    MalformedArtifactError,
    ModelNotFoundError,
    RequestError,
    UnsafeFormatError,
    UnsupportedModelError,
)
from tests.audit.conftest import FILES, OUT, low_rank, rewrite
from tests.formats.made import random_edit, sites_of, tree
from tests.tiny import build

CROSS = (".attn2.to_k.weight", ".attn2.to_v.weight")


def cast(folder, dtype) -> None:
    """Store every component in another dtype."""
    for component, name in FILES.items():
        rewrite(folder / component / name, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))


def test_an_untouched_copy_does_not_differ(base, edited):
    found = diff(base, edited(base))
    assert not found.tensors and not found.differs and not found.not_compared
    assert found.compared == found.identical > 100
    assert found.guess == "The weights are the same." and found.overall is None


def test_an_ablation_is_found_with_rank_norm_and_word(base, tmp_path):
    editor = Editor(base)
    edit = editor.ablate(
        "dog", target="cat", updater=build.plain(eos_weight=0)
    )  # preserves the other objects of the vocabulary
    editor.save_pipeline(tmp_path / "merged")
    found = diff(base, tmp_path / "merged")
    record = edit.manifest.sites[0]
    assert [tensor.name for tensor in found.changed] == [f"{record.site.name}.weight"]
    (tensor,) = found.changed
    change = edit.delta.factors[record.site].compress(1e-6)
    assert tensor.rank == change.rank and tensor.relative_norm == pytest.approx(record.relative_norm, rel=1e-4)
    ranked = [move.word for move in found.overall.words if move.word != "flat"]
    assert ranked[0] == "dog"
    assert {move.word for move in found.overall.words} == {"dog", "cat", "pig", "house", "tree", "boat", "flat"}
    assert "one text-encoder attention output" in found.guess and "Diff-QuickFix" in found.guess
    assert found.differs and found.identical == found.compared - 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_copy_is_rounding_only(base, edited, dtype):
    copy = edited(base)
    cast(copy, dtype)
    for one, other in ((base, copy), (copy, base)):
        found = diff(one, other)
        assert found.tensors and not found.changed and not found.differs
        assert {tensor.state for tensor in found.tensors} == {"rounding"}
        assert found.guess.startswith("Rounding only")


def test_an_edit_is_found_in_a_half_precision_copy(base, edited):
    def change(tensors):
        tensors[OUT] = (tensors[OUT].double() + low_rank(tensors[OUT], 2, 0.3)).float()

    copy = edited(base, "text_encoder", change)
    cast(copy, torch.float16)
    found = diff(base, copy)
    assert [tensor.name for tensor in found.changed] == [f"text_encoder.{OUT}"]
    assert found.changed[0].rank == 2 and found.changed[0].relative_norm == pytest.approx(0.3, rel=0.01)
    assert "closed-form edit of one text-encoder attention output" in found.guess


def cross_edit(rank: int, sides=CROSS, blocks: str = "", shared: bool = True):
    """K and V of cross-attention, changed as a closed form changes them: from the same inputs in every layer."""

    def change(tensors):
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(rank, 32, generator=generator, dtype=torch.float64)
        for name in [name for name in tensors if name.endswith(sides) and blocks in name]:
            if not shared:
                inputs = torch.randn(rank, 32, generator=generator, dtype=torch.float64)
            up = torch.randn(tensors[name].shape[0], rank, generator=generator, dtype=torch.float64)
            step = up @ inputs
            step *= 0.2 * tensors[name].double().norm() / step.norm()
            tensors[name] = (tensors[name].double() + step).float()

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cross_edit(3), "closed-form edit of all cross-attention keys and values (as UCE or TIME"),
        (cross_edit(2, CROSS[1:]), "closed-form edit of all cross-attention values (as UCE or TIME"),
        (cross_edit(2, CROSS, "mid_block"), "2 of 8 cross-attention keys and values (as LocoEdit"),
        (cross_edit(3, shared=False), "low-rank adapter (LoRA) merged into all cross-attention"),
        (cross_edit(16), "training of all cross-attention keys and values (as ESD-x"),
    ],
)
def test_cross_attention_edits_are_named(base, edited, change, words):
    found = diff(base, edited(base, "unet", change))
    assert words in found.guess, found.guess
    assert len(found.words) == len(found.changed) and found.overall is not None
    assert "|".join(found.evidence).count("of the cross-attention change acts on common input directions") == 1


def test_a_merged_adapter_is_named(base, edited):
    def change(tensors):
        names = [name for name in tensors if name.endswith(("q_proj.weight", "v_proj.weight"))]
        for seed, name in enumerate(names):
            tensors[name] += low_rank(tensors[name], 4, 0.1, seed).float()

    assert "low-rank adapter (LoRA)" in diff(base, edited(base, "text_encoder", change), words=()).guess


def test_fine_tuning_is_named(base, edited):
    generator = torch.Generator().manual_seed(2)

    def change(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor + 0.02 * torch.randn(tensor.shape, generator=generator) * tensor.std()

    found = diff(base, edited(base, "unet", change), words=())
    assert "fine-tuning of the unet" in found.guess
    assert found.words_note == "no words were asked for"


def test_one_rank_one_mlp_is_named(base, edited):
    name = "text_model.encoder.layers.1.mlp.fc2.weight"

    def change(tensors):
        tensors[name] += low_rank(tensors[name], 1, 0.1).float()

    assert "rank-one edit of one text-encoder MLP (as ReFACT" in diff(base, edited(base, change=change), words=()).guess


def test_a_changed_token_embedding_is_named_with_its_word(base, edited):
    editor = Editor(base)
    token = editor.pipeline.tokenizer("dog")["input_ids"][-2]
    name = "text_model.embeddings.token_embedding.weight"

    def change(tensors):
        tensors[name][token] *= 2.0

    found = diff(base, edited(base, change=change))
    assert "edit of 1 of " in found.guess and found.changed[0].rows == 1
    assert found.overall.words[0].word == "dog" and found.overall.words[0].moved == pytest.approx(1.0)


def test_repeated_rounding_is_no_edit(base, edited):
    def change(tensors):
        step = low_rank(tensors[OUT], 3, 0.5).float()
        tensors[OUT] = (tensors[OUT] + step) - step

    found = diff(base, edited(base, change=change))
    assert (found.tensors and "not an edit" in found.guess) or found.guess.startswith("Rounding only")


def test_what_is_not_finite_is_said_first(base, edited):
    def change(tensors):
        tensors[OUT][0, 0] = float("nan")

    found = diff(base, edited(base, change=change))
    assert "NaN" in found.guess and found.changed[0].state == "not finite" and found.differs


@pytest.mark.parametrize("part", ["text", "unet"])
def test_folder_and_file_in_any_mix(files, folders, family, part, tmp_path):
    editor = Editor(files[family], config=str(folders[family]))
    edit = random_edit(editor, sites_of(editor, part))
    save_checkpoint(editor.backend, files[family], tmp_path / "edited.safetensors")
    editor.save_pipeline(tmp_path / "edited")
    wanted = {f"{site.name}.weight": change.compress(1e-6).rank for site, change in edit.delta}
    for one in (files[family], folders[family]):
        for other in (tmp_path / "edited.safetensors", tmp_path / "edited"):
            both_files = one.suffix == other.suffix == ".safetensors"
            found = diff(one, other, config=folders[family], words=["dog", "cat"] if both_files else [])
            assert {tensor.name: tensor.rank for tensor in found.changed} == wanted
            assert not found.reshaped and not found.not_compared
            assert not both_files or len(found.overall.words) == 2


def test_a_file_can_be_run_with_the_configuration_of_the_folder_it_is_compared_with(files, base, edited):
    def change(tensors):
        tensors[OUT] += low_rank(tensors[OUT], 1, 0.2).float()

    found = diff(files["sd1"], edited(base, change=change))
    assert found.overall is not None and found.words_note is None


def test_a_base_that_cannot_be_run_is_a_note_and_no_error(files, base, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tensors = load_file(files["sd1"])
    key = "cond_stage_model.transformer." + OUT
    tensors[key] = tensors[key] + low_rank(tensors[key], 1, 0.2).float()
    save_file(tensors, tmp_path / "edited.safetensors")
    found = diff(files["sd1"], tmp_path / "edited.safetensors", config=tmp_path / "nothing")
    assert found.changed and found.overall is None
    assert found.words_note.startswith("the base cannot be run")


def test_a_loose_file_of_a_few_layers_is_compared_and_the_rest_is_said(base, edited, tmp_path):
    copy = edited(base, "unet", cross_edit(2))
    tensors = {k: v for k, v in load_file(copy / "unet" / FILES["unet"]).items() if k.endswith(CROSS)}
    save_file(tensors, tmp_path / "erased.safetensors")
    found = diff(base, tmp_path / "erased.safetensors")
    assert found.compared == len(found.changed) == 8 and "UCE or TIME" in found.guess
    said = {item.what.split()[-1]: item.reason for item in found.not_compared}
    assert said["vae"].startswith("only the base has it") and said["text_encoder"].startswith("only the base has it")
    assert said["unet"].startswith("only the base has them")
    assert found.differs


def test_missing_and_superfluous_tensors_are_said(base, edited):
    def change(tensors):
        del tensors["text_model.final_layer_norm.bias"]
        tensors["text_model.extra"] = torch.zeros(3)

    found = diff(base, edited(base, change=change))
    assert found.only_base == ("text_encoder.text_model.final_layer_norm.bias",)
    assert found.only_edited == ("text_encoder.text_model.extra",)
    assert found.differs and not found.changed and len(found.not_compared) == 2


def test_a_component_that_one_side_lacks_is_said_but_is_no_difference(base, edited):
    copy = edited(base)
    shutil.rmtree(copy / "vae")
    found = diff(base, copy)
    assert [item.what for item in found.not_compared] == ["vae"] and not found.differs


def test_another_architecture_is_said(base, edited):
    def change(tensors):
        tensors[OUT] = torch.zeros(16, 32)

    found = diff(base, edited(base, change=change))
    assert "different architectures" in found.guess and found.reshaped == (f"text_encoder.{OUT}",) and found.differs


def test_a_model_of_another_width_is_said(base, edited):
    def change(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor[::2]

    found = diff(base, edited(base, change=change))
    assert found.differs and len(found.reshaped) == sum(name.startswith("text_encoder.") for name in found.reshaped)
    assert [item.reason.split(",")[0] for item in found.not_compared] == ["their shapes differ"]
    assert found.not_compared[0].what == f"{len(found.reshaped)} tensors of text_encoder"


def test_models_without_a_common_tensor_are_refused(base, tmp_path):
    save_file({"decoder.x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UnsupportedModelError, match="no tensor in common"):
        diff(base, tmp_path / "other.safetensors")


def test_pickles_are_refused(base, edited, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02.")
    with pytest.raises(UnsafeFormatError):
        diff(base, tmp_path / "model.ckpt")
    copy = edited(base)
    for component, name in FILES.items():
        (copy / component / name).rename(copy / component / "model.bin")
    with pytest.raises(UnsafeFormatError, match="pickles only"):
        diff(base, copy)


def test_a_component_of_pickles_is_not_opened_and_said(base, edited):
    copy = edited(base)
    (copy / "vae" / FILES["vae"]).rename(copy / "vae" / "diffusion_pytorch_model.bin")
    found = diff(base, copy)
    assert any(item.what == "vae" and "pickles" in item.reason for item in found.not_compared)


def test_a_damaged_file_is_refused(base, edited):
    copy = edited(base)
    path = copy / "unet" / FILES["unet"]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(MalformedArtifactError, match="cut short"):
        diff(base, copy)


def test_variants_shards_and_strange_indices(base, edited, tmp_path):
    copy = edited(base)
    place = copy / "unet"
    tensors = load_file(place / FILES["unet"])
    names = sorted(tensors)
    (place / FILES["unet"]).unlink()
    parts = {f"diffusion_pytorch_model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, place / file)
    index = place / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: file for file, keys in parts.items() for key in keys}}))
    assert not diff(base, copy).differs
    index.write_text(json.dumps({"weight_map": {"a": "../../text_encoder/model.safetensors"}}))
    with pytest.raises(MalformedArtifactError, match="outside its folder"):
        diff(base, copy)
    index.unlink()
    for file in parts:
        (place / file).unlink()
    save_file(tensors, place / "diffusion_pytorch_model.fp16.safetensors")
    assert not diff(base, copy).differs
    save_file(tensors, place / "diffusion_pytorch_model.other.safetensors")
    with pytest.raises(ModelNotFoundError, match="several sets"):
        diff(base, copy)


def test_edits_and_adapters_are_no_models(base, tmp_path):
    Editor(base).ablate("dog", target="cat", preserve=[]).save(tmp_path / "no-dog")
    for name in ("no-dog", "no-dog/edit.safetensors", "no-dog/pytorch_lora_weights.safetensors"):
        with pytest.raises(ModelNotFoundError):
            diff(base, tmp_path / name)


def test_nothing_is_written_and_no_pipeline_is_loaded_without_words(base, edited, monkeypatch):
    def change(tensors):
        tensors[OUT] += low_rank(tensors[OUT], 1, 0.2).float()

    copy = edited(base, change=change)
    before = tree(base), tree(copy)
    code = (
        "import sys, diffedit; found = diffedit.diff(sys.argv[1], sys.argv[2], words=[]);"
        "assert found.changed; assert 'diffusers' not in sys.modules, 'a pipeline was loaded'"
    )
    subprocess.run([sys.executable, "-c", code, str(base), str(copy)], check=True, timeout=120)
    diff(base, copy)
    assert (tree(base), tree(copy)) == before


def test_words_are_the_given_ones_and_more(base, edited):
    def change(tensors):
        tensors[OUT] += low_rank(tensors[OUT], 1, 0.2).float()

    copy = edited(base, change=change)
    assert {move.word for move in diff(base, copy, words=["sun"], more_words=["moon"]).overall.words} == {"sun", "moon"}
    assert "moon" in {move.word for move in diff(base, copy, more_words=["moon"]).overall.words}
    (copy / "vocabulary.json").unlink()
    nouns = diff(copy, base)  # a base without a vocabulary: the bundled nouns
    assert len(nouns.overall.words) > 100
    with pytest.raises(RequestError):
        diff(base, copy, words="dog")


def test_the_audit_is_frozen_and_turns_into_json(base, edited):
    def change(tensors):
        tensors[OUT] += low_rank(tensors[OUT], 1, 0.2).float()

    found = diff(base, edited(base, change=change))
    again = diffedit.ModelDiff.model_validate_json(found.model_dump_json())
    assert again == found
    with pytest.raises(ValueError, match="frozen"):
        found.base = "other"
    text = found.summary()
    assert "1 changed" in text and "rank 1 of 32" in text and "median" in text


def test_a_live_pipeline_is_no_model_on_disk(base):
    with pytest.raises(ModelNotFoundError):
        diff(Editor(base).pipeline, base)
