"""The names that edit sites have in single-file checkpoints (the layout of the original Stable Diffusion code).

    text, SD 1.x   cond_stage_model.transformer.text_model.encoder.layers.N.self_attn.out_proj.weight
    text, SD 2.x   cond_stage_model.model.transformer.resblocks.N.attn.out_proj.weight    (fc2: mlp.c_proj)
    text, SDXL     conditioner.embedders.0.transformer.text_model.encoder.layers.N...     (text_encoder)
                   conditioner.embedders.1.model.transformer.resblocks.N...               (text_encoder_2)
    UNet           model.diffusion_model.input_blocks.I.1.transformer_blocks.0.attn2.to_k.weight
                   (or middle_block.1..., output_blocks.I.1...); a residual block's time_emb_proj is
                   input_blocks.I.0.emb_layers.1 (or middle_block.0... and .2..., output_blocks.I.0...)

Both kinds of text tensors are [d_out, d_in] as in transformers, so nothing is transposed. The UNet's flat block number
I counts, with L layers per block: 1 + b (L + 1) + a on the way down (conv_in is block 0), b (L + 1) + a on the way up.
Source: the conversion in diffusers' `single_file_utils`, and checkpoints that it opens.
"""

from __future__ import annotations

import re

from diffedit.errors import UnsupportedModelError
from diffedit.site import EditSite

UNET_PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema."

_TEXT = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(self_attn\.out_proj|mlp\.fc2)")
_OPEN_CLIP = {"self_attn.out_proj": "attn.out_proj", "mlp.fc2": "mlp.c_proj"}
_INNER = (
    r"transformer_blocks\.\d+\.(?:attn2\.to_[kv]|attn1\.to_(?:q|k|v|out\.0)|ff\.net\.(?:0\.proj|2))|proj_(?:in|out)"
)
_UNET = re.compile(
    rf"(?:(down|up)_blocks\.(\d+)|mid_block)\.(?:attentions\.(\d+)\.({_INNER})|resnets\.(\d+)\.time_emb_proj)"
)


def checkpoint_names(site: EditSite, layers_per_block: int) -> tuple[str, ...]:
    """The names under which checkpoints hold the site's weight, most usual first.

    Args:
        site: an edit site.
        layers_per_block: of the UNet; 2 in Stable Diffusion.

    Raises:
        UnsupportedModelError: the layer has no known name there.
    """
    if site.component == "text_encoder" and (match := _TEXT.fullmatch(site.path)):
        layer, part = match.groups()
        return (
            f"cond_stage_model.transformer.{site.path}.weight",
            f"cond_stage_model.model.transformer.resblocks.{layer}.{_OPEN_CLIP[part]}.weight",
            f"cond_stage_model.transformer.{site.path.removeprefix('text_model.')}.weight",  # some early fine-tunes
            f"conditioner.embedders.0.transformer.{site.path}.weight",
        )
    if site.component == "text_encoder_2" and (match := _TEXT.fullmatch(site.path)):
        layer, part = match.groups()
        return (f"conditioner.embedders.1.model.transformer.resblocks.{layer}.{_OPEN_CLIP[part]}.weight",)
    if site.component == "unet" and (match := _UNET.fullmatch(site.path)):
        side, block, attention, rest, residual = match.groups()
        inner = "emb_layers.1" if rest is None else rest
        if side is None:
            place = f"middle_block.{1 if residual is None else 2 * int(residual)}"
        else:
            number = int(block) * (layers_per_block + 1) + int(attention or residual)
            place = f"input_blocks.{1 + number}" if side == "down" else f"output_blocks.{number}"
            place += ".1" if residual is None else ".0"
        return (f"{UNET_PREFIX}{place}.{inner}.weight",)
    raise UnsupportedModelError(
        "the layer has no known name in single-file checkpoints", value=site.name, hint="save the model as a folder"
    )
