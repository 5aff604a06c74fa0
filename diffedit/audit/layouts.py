"""One name per tensor, whatever program wrote the file.

The canonical name is the component, a dot, and the name in that component's diffusers file:

    text_encoder.text_model.encoder.layers.0.self_attn.out_proj.weight
    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight

Three dialects are translated into it. *Diffusers folders*: transformers from 5.6 on may leave `text_model.` out, old
diffusers called the VAE's attention `query`, `key`, `value`, `proj_attn`. *Single files* (the original layout of Stable
Diffusion, which A1111 and ComfyUI read): UNet blocks are numbered through, the VAE's decoder is numbered backwards, the
text encoder of SD 2.x is OpenCLIP's, whose q, k and v lie in one tensor. *Loose files* with diffusers names, as the
authors of UCE, ESD and others publish: a prefix is put in front. What no rule knows keeps its own name.

Sources: the key names are those of CompVis' and Stability's checkpoints, the diffusers names those of the library's
own files; the tests compare with what `StableDiffusionPipeline.from_single_file` makes of the same file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

_SINGLE_FILE = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")
_COMPONENTS = ("text_encoder_2.", "text_encoder.", "unet.", "vae.")
_UNET_PARTS = r"(?:conv_in|conv_out|conv_norm_out|time_embedding|add_embedding|down_blocks|mid_block|up_blocks)\."
_CLIP_PARTS = r"(?:encoder\.layers|embeddings|final_layer_norm)\."

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_UNET_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OPEN_CLIP = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


@dataclass(frozen=True)
class Piece:
    """A tensor of a model inside a file.

    Attributes:
        name: canonical.
        key: name in the file.
        third: 0, 1 or 2 for q, k or v of a fused tensor, whose rows are cut in three; else `None`.
    """

    name: str
    key: str
    third: int | None = None


def component_pieces(component: str, keys: Iterable[str]) -> list[Piece]:
    """The tensors of one component's diffusers file."""
    return [Piece(f"{component}.{_diffusers(component, key)}", key) for key in keys]


def file_pieces(keys: Collection[str]) -> list[Piece]:
    """The tensors of a file that may hold a whole model or a part of one."""
    if not any(key.startswith(_SINGLE_FILE) for key in keys):
        return [_loose(key) for key in keys]
    unet, vae = _Unet(keys), _Vae(keys)
    out: list[Piece] = []
    for key in keys:
        if key.startswith("model.diffusion_model."):
            out.append(Piece("unet." + unet.name(key.removeprefix("model.diffusion_model.")), key))
        elif key.startswith("first_stage_model."):
            out.append(Piece("vae." + vae.name(key.removeprefix("first_stage_model.")), key))
        else:
            out += _text(key)
    return out


def is_buffer(name: str) -> bool:
    """Whether a name is that of a table of positions, which some versions of the libraries save and some do not."""
    return name.endswith("position_ids")


def _loose(key: str) -> Piece:
    component, _, rest = key.partition(".")
    if f"{component}." in _COMPONENTS:
        return Piece(f"{component}.{_diffusers(component, rest)}", key)
    if re.match(_UNET_PARTS, key):
        return Piece(f"unet.{key}", key)
    if key.startswith("text_model.") or re.match(_CLIP_PARTS, key):
        return Piece(f"text_encoder.{_diffusers('text_encoder', key)}", key)
    return Piece(key, key)


def _diffusers(component: str, key: str) -> str:
    if component.startswith("text_encoder"):
        return f"text_model.{key}" if re.match(_CLIP_PARTS, key) else key
    if component == "vae" and ".attentions." in key:
        head, name, leaf = key.rsplit(".", 2)
        return f"{head}.{_OLD_VAE.get(name, name)}.{leaf}"
    return key


def _text(key: str) -> list[Piece]:
    """Text encoders of SD 1.x, 2.x and XL in a single file; anything else under its own name."""
    for prefix, component in (
        ("cond_stage_model.transformer.", "text_encoder"),
        ("cond_stage_model.model.", "text_encoder"),
        ("conditioner.embedders.0.transformer.", "text_encoder"),
        ("conditioner.embedders.1.model.", "text_encoder_2"),
    ):
        rest = key.removeprefix(prefix)
        if rest != key and not prefix.endswith(".model."):
            return [Piece(f"{component}.{_diffusers(component, rest)}", key)]
        if rest != key:
            return _open_clip(component, rest, key)
    return [Piece(key, key)]


def _open_clip(component: str, rest: str, key: str) -> list[Piece]:
    if rest in _OPEN_CLIP:
        return [Piece(f"{component}.{_OPEN_CLIP[rest]}", key)]
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", rest)
    if match is None:
        return [Piece(key, key)]
    layer, inner, leaf = f"{component}.text_model.encoder.layers.{match[1]}", match[2], match[3]
    if inner == "attn.in_proj":
        return [Piece(f"{layer}.self_attn.{part}_proj.{leaf}", key, third) for third, part in enumerate("qkv")]
    return [Piece(f"{layer}.{_OPEN_CLIP_LAYER.get(inner, inner)}.{leaf}", key)]


class _Unet:
    """Numbers of the UNet's blocks: the first downsampler tells how many layers a block has."""

    def __init__(self, keys: Iterable[str]) -> None:
        prefix = "model.diffusion_model."
        names = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
        downs = [int(m[1]) for name in names if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.", name))]
        blocks = [int(m[1]) for name in names if (m := re.match(r"input_blocks\.(\d+)\.", name))]
        self._per_block = min(downs, default=max(blocks, default=0) + 1)

    def name(self, key: str) -> str:
        for old, new in _UNET_TOP.items():
            if key.startswith(old + "."):
                return new + key.removeprefix(old)
        if (middle := re.fullmatch(r"middle_block\.([012])\.(.+)", key)) is not None:
            part = _MIDDLE[middle[1]]
            return f"mid_block.{part}.{_resnet(middle[2]) if part.startswith('resnets') else middle[2]}"
        match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", key)
        if match is None:
            return key
        index = int(match[2]) - (match[1] == "input")
        block, layer = divmod(index, self._per_block)
        side, kind, rest = {"input": "down", "output": "up"}[match[1]], match[3], match[4]
        if rest.startswith("op."):
            return f"down_blocks.{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        if kind != "0" and rest.startswith("conv."):
            return f"up_blocks.{block}.upsamplers.0.{rest}"
        part = f"resnets.{layer}.{_resnet(rest)}" if kind == "0" else f"attentions.{layer}.{rest}"
        return f"{side}_blocks.{block}.{part}"


class _Vae:
    """Names of the VAE: the decoder's blocks are counted from the other end."""

    def __init__(self, keys: Iterable[str]) -> None:
        found = [int(m[1]) for key in keys if (m := re.match(r"first_stage_model\.decoder\.up\.(\d+)\.", key))]
        self._last = max(found, default=0)

    def name(self, key: str) -> str:
        key = key.replace("nin_shortcut", "conv_shortcut").replace("coder.norm_out.", "coder.conv_norm_out.")
        key = re.sub(r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", key)
        if (attention := re.fullmatch(r"(\w+)\.mid\.attn_1\.(\w+)\.(\w+)", key)) is not None:
            inner = _VAE_ATTENTION.get(attention[2], attention[2])
            return f"{attention[1]}.mid_block.attentions.0.{inner}.{attention[3]}"
        key = re.sub(r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets.", key)
        key = re.sub(r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0.", key)
        key = re.sub(r"\.up\.(\d+)\.block\.", lambda m: f".up_blocks.{self._last - int(m[1])}.resnets.", key)
        return re.sub(r"\.up\.(\d+)\.upsample\.", lambda m: f".up_blocks.{self._last - int(m[1])}.upsamplers.0.", key)


def _resnet(rest: str) -> str:
    name, _, leaf = rest.rpartition(".")
    return f"{_RESNET.get(name, name)}.{leaf}"
