"""Every dialect is translated into the same names, checked against what diffusers makes of the same keys."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from diffedit.audit.layouts import component_pieces, file_pieces, is_buffer
from diffedit.audit.weights import Weights
from tests.tiny import build, ldm

UNETS = {
    "sd1": dict(cross_attention_dim=768, attention_head_dim=8),
    "sd2": dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True),
}


def names(pieces) -> dict[str, str]:
    return {piece.key: piece.name for piece in pieces}


@pytest.mark.parametrize("family", UNETS)
def test_the_unet_of_true_size_is_named_as_diffusers_names_it(family):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[family])
    prefix = "model.diffusion_model."
    keys = {prefix + ldm._unet(key, 2, unet.config.up_block_types): key for key in unet.state_dict()}
    theirs = single_file_utils.convert_ldm_unet_checkpoint({key: key for key in keys}, dict(unet.config))
    ours = names(file_pieces(keys))
    assert {name.removeprefix("unet."): key for key, name in ours.items()} == theirs
    assert set(theirs) == set(unet.state_dict())


def test_the_vae_of_true_size_is_named_as_diffusers_names_it():
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    keys = {"first_stage_model." + ldm._vae(key, 4): key for key in vae.state_dict()}
    checkpoint = {key: torch.empty(4, 4, 1, 1, device="meta") for key in keys}
    theirs = single_file_utils.convert_ldm_vae_checkpoint(checkpoint, dict(vae.config))
    ours = names(file_pieces(keys))
    assert {name.removeprefix("vae.") for name in ours.values()} == set(theirs) == set(vae.state_dict())
    assert all(ours[key] == f"vae.{name}" for key, name in keys.items())


def test_open_clip_is_named_as_diffusers_names_it(files):
    keys = [key for key in load_file(files["sd2"]) if key.startswith("cond_stage_model.model.")]
    checkpoint = {key: torch.empty(96, 32) for key in keys}
    encoder = build.text_encoder(50, "sd2")
    theirs = single_file_utils.convert_open_clip_checkpoint(encoder, checkpoint)
    assert {piece.name.removeprefix("text_encoder.") for piece in file_pieces(keys)} == set(theirs)


def test_files_and_folders_hold_the_same_tensors_under_the_same_names(files, folders, family):
    with Weights(files[family]) as file, Weights(folders[family]) as folder:
        assert set(file.names) == set(folder.names)
        for name in folder.names:
            assert file.shape(name) == folder.shape(name), name
            assert torch.equal(file.tensor(name), folder.tensor(name)), name


def test_the_live_pipeline_made_of_a_file_holds_what_we_read_from_the_file(files, folders, family):
    pipeline = StableDiffusionPipeline.from_single_file(str(files[family]), config=str(folders[family]))
    with Weights(files[family]) as file:
        for part in ("unet", "vae", "text_encoder"):
            for key, value in getattr(pipeline, part).state_dict().items():
                nested = f"text_model.{key}" if part == "text_encoder" else key
                assert torch.equal(file.tensor(f"{part}.{nested}").reshape(value.shape), value), key


def test_flat_and_nested_text_encoders_are_one(folders, tmp_path):
    tensors = load_file(folders["sd1"] / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in tensors)
    nested, flat = tensors, [key.removeprefix("text_model.") for key in tensors]
    one, other = component_pieces("text_encoder", nested), component_pieces("text_encoder", flat)
    assert [piece.name for piece in one] == [piece.name for piece in other]
    assert len({piece.name for piece in one}) == len(tensors)
    in_file = file_pieces([f"cond_stage_model.transformer.{key}" for key in flat])
    assert [piece.name for piece in in_file] == [piece.name for piece in one]


def test_loose_files_of_unets_and_text_encoders():
    cross = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    clip = "encoder.layers.3.mlp.fc2.weight"
    found = names(file_pieces([cross, clip, "unet.conv_in.bias", "text_encoder.text_model.x", "something.else"]))
    assert found == {
        cross: f"unet.{cross}",
        clip: f"text_encoder.text_model.{clip}",
        "unet.conv_in.bias": "unet.conv_in.bias",
        "text_encoder.text_model.x": "text_encoder.text_model.x",
        "something.else": "something.else",
    }


def test_the_old_names_of_the_vaes_attention():
    old = [f"decoder.mid_block.attentions.0.{part}.weight" for part in ("query", "key", "value", "proj_attn")]
    found = [piece.name for piece in component_pieces("vae", old)]
    assert [re.sub(r".*attentions\.0\.", "", name) for name in found] == [
        "to_q.weight",
        "to_k.weight",
        "to_v.weight",
        "to_out.0.weight",
    ]


def test_sdxl_text_encoders_have_a_component_each():
    keys = [
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.bias",
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.bias",
    ]
    assert [piece.name.split(".")[0] for piece in file_pieces(keys)] == ["text_encoder", "text_encoder_2"]


def test_a_name_that_two_tensors_claim_is_kept_for_one_and_the_other_keeps_its_own(tmp_path):
    head = "cond_stage_model.transformer."
    key = "encoder.layers.0.mlp.fc1.bias"
    save_file({head + key: torch.zeros(2), f"{head}text_model.{key}": torch.ones(2)}, tmp_path / "odd.safetensors")
    with Weights(tmp_path / "odd.safetensors") as found:
        assert len(found.names) == 2 and f"text_encoder.text_model.{key}" in found


def test_tables_of_positions_are_left_out():
    assert is_buffer("text_encoder.text_model.embeddings.position_ids")
    assert not is_buffer("text_encoder.text_model.embeddings.position_embedding.weight")
