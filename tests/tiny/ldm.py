"""A tiny pipeline as one original-layout checkpoint, as people trade them: the inverse of diffusers' key mapping."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import save_file

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE = {"resnets.0": "middle_block.0", "attentions.0": "middle_block.1", "resnets.1": "middle_block.2"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write(pipeline, path: Path) -> Path:
    """Write the pipeline's UNet, VAE and text encoder into one `.safetensors` file."""
    tensors = {}
    layers = pipeline.unet.config.layers_per_block
    for key, value in pipeline.unet.state_dict().items():
        tensors["model.diffusion_model." + _unet(key, layers, pipeline.unet.config.up_block_types)] = value
    blocks = len(pipeline.vae.config.block_out_channels)
    for key, value in pipeline.vae.state_dict().items():
        name = _vae(key, blocks)
        square = ".attn_1." in name and value.ndim == 2
        tensors["first_stage_model." + name] = value[:, :, None, None] if square else value
    for key, value in pipeline.text_encoder.state_dict().items():
        tensors["cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")] = value
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path)
    return path


def _unet(key: str, layers: int, up_types: tuple[str, ...]) -> str:
    for old, new in _TOP.items():
        if key.startswith(old + "."):
            return new + key.removeprefix(old)
    if key.startswith("mid_block."):
        part, rest = re.match(r"mid_block\.(\w+\.\d)\.(.*)", key).groups()
        return f"{_MIDDLE[part]}.{_resnet(rest) if part.startswith('resnets') else rest}"
    side, block, kind, index, rest = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key).groups()
    block, index = int(block), int(index)
    first = block * (layers + 1) + (1 if side == "down" else 0)
    group = {"down": "input_blocks", "up": "output_blocks"}[side]
    if kind == "resnets":
        return f"{group}.{first + index}.0.{_resnet(rest)}"
    if kind == "attentions":
        return f"{group}.{first + index}.1.{rest}"
    if kind == "downsamplers":
        return f"{group}.{first + layers}.0.op.{rest.removeprefix('conv.')}"
    return f"{group}.{first + layers}.{2 if 'CrossAttn' in up_types[block] else 1}.{rest}"


def _resnet(rest: str) -> str:
    name, _, leaf = rest.rpartition(".")
    return f"{_RESNET[name]}.{leaf}"


def _vae(key: str, blocks: int) -> str:
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0." in key:
        head, rest = key.split("mid_block.attentions.0.")
        name, _, leaf = rest.rpartition(".")
        return f"{head}mid.attn_1.{_VAE_ATTENTION[name]}.{leaf}"
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", key)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)
