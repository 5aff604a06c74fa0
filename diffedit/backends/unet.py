"""The UNet's cross-attention: where the picture reads the text, as edit sites.

Each cross-attention block projects the text encoder's final hidden states h [t, d_in] to keys K = W_k h and values
V = W_v h. These two layers see nothing of the picture, so what they compute for a prompt needs no UNet run: their
input *is* h, in all blocks and at every denoising step. Their outputs are added to no residual stream (they only feed
the attention), so the stream that is recorded for them is zero.

Source: Orgad et al. 2023 (TIME, arXiv 2303.08084) and Gandikota et al. 2024 (UCE, arXiv 2308.14761) edit these layers.
Limits: a UNet that transforms the text embeddings first (`encoder_hid_proj`) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from diffedit.backends.hooks import Record
from diffedit.backends.precision import widened
from diffedit.errors import UnsupportedModelError
from diffedit.site import EditSite, Role

UNET = "unet"

UNET_PARTS = ("down_blocks", "mid_block", "up_blocks")  # the order of the forward pass, not that of registration
_BLOCK = "attn2"
_LAYERS = {"to_k": Role.UNET_CROSS_ATTN_K, "to_v": Role.UNET_CROSS_ATTN_V}
_PATH = re.compile(rf"(?:{'|'.join(UNET_PARTS)})\.[a-z0-9_.]+\.{_BLOCK}\.(?:{'|'.join(_LAYERS)})")


def cross_attention_sites(unet: Any) -> tuple[EditSite, ...]:
    """Key and value projections of every cross-attention block, in the order of the forward pass; () without a UNet."""
    blocks = [
        (name, module)
        for part in UNET_PARTS
        if isinstance(getattr(unet, part, None), nn.Module)
        for name, module in getattr(unet, part).named_modules(prefix=part)
        if name.endswith(f".{_BLOCK}") and all(hasattr(module, layer) for layer in _LAYERS)
    ]
    sites = []
    for index, (name, module) in enumerate(blocks):
        for layer, role in _LAYERS.items():
            linear: Any = getattr(module, layer)
            sites.append(EditSite(UNET, f"{name}.{layer}", index, role, linear.out_features, linear.in_features))
    return tuple(sites)


def cross_attention_layer(unet: Any, site: EditSite) -> Any:
    """The site's linear layer.

    Raises:
        UnsupportedModelError: the UNet has no such site.
    """
    try:
        return unet.get_submodule(site.path if _PATH.fullmatch(site.path) else "no cross-attention")
    except AttributeError as error:
        known = len(cross_attention_sites(unet))
        raise UnsupportedModelError(
            "the model has no such edit site",
            value=site.name,
            cause=f"its UNet has {known} key and value projections of cross-attention, this is none of them",
        ) from error


def record_cross_attention(unet: Any, sites: Iterable[EditSite], hidden: Tensor, seen: Record) -> None:
    """Note what the sites make of `hidden` [b, t, d_in], the text encoder's final hidden states."""
    if getattr(unet, "encoder_hid_proj", None) is not None:
        raise UnsupportedModelError(
            "the UNet transforms the text embeddings before cross-attention reads them",
            value=type(unet.encoder_hid_proj).__name__,
            hint="choose sites in the text encoder",
        )
    for site in sites:
        layer = cross_attention_layer(unet, site)
        weight = getattr(layer, "base_layer", layer).weight
        inputs = hidden.to(device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
        with widened(layer):
            outputs = layer(inputs).detach()
        seen.inputs[site], seen.outputs[site] = inputs, outputs
        seen.streams[site] = outputs.new_zeros(()).expand(outputs.shape)
