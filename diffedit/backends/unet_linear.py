"""The UNet's linear layers outside of cross-attention, as edit sites for updaters that train.

Four kinds, all of the form y = W x + b:

    self-attention   attn1.to_q, to_k, to_v, to_out.0          what a place in the picture takes from other places
    feed-forward     ff.net.0.proj, ff.net.2
    time             time_emb_proj of the residual blocks
    projections      proj_in, proj_out around the transformer blocks, where they are linear (Stable Diffusion 2.x)

What they read depends on the picture, the noise and the step, so a prompt alone has no keys here and `capture` refuses
them. Convolutions are no edit sites: an edit holds matrices, and adapter files know convolutions in layouts of their
own.

Source: Gandikota et al. 2023 (ESD, arXiv 2303.07345) train what is not cross-attention, time embedding and output.
Limits: of the parameters outside of cross-attention these hold 27% in Stable Diffusion 1.x; convolutions hold the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from diffedit.backends.unet import UNET, UNET_PARTS
from diffedit.errors import UnsupportedModelError
from diffedit.site import EditSite, Role

_TAILS = {
    Role.UNET_SELF_ATTN: re.compile(r"(.+\.attn1)\.to_(?:q|k|v|out\.0)"),
    Role.UNET_FEED_FORWARD: re.compile(r"(.+\.ff)\.net\.(?:0\.proj|2)"),
    Role.UNET_TIME: re.compile(r"(.+)\.time_emb_proj"),
    Role.UNET_PROJECTION: re.compile(r"(.+)\.proj_(?:in|out)"),
}
LINEAR_ROLES = tuple(_TAILS)


def linear_sites(unet: Any) -> tuple[EditSite, ...]:
    """The sites of every kind, each kind counted in the order of the forward pass; () without a UNet."""
    sites = []
    for role, tail in _TAILS.items():
        blocks: dict[str, int] = {}
        for path, module in _modules(unet):
            match = tail.fullmatch(path)
            plain = getattr(module, "base_layer", module)
            if match is not None and isinstance(plain, nn.Linear):
                index = blocks.setdefault(match[1], len(blocks))
                sites.append(EditSite(UNET, path, index, role, plain.out_features, plain.in_features))
    return tuple(sites)


def linear_layer(unet: Any, site: EditSite) -> Any:
    """The site's linear layer.

    Raises:
        UnsupportedModelError: the UNet has no such site.
    """
    known = _TAILS[site.role].fullmatch(site.path) and site.path.startswith(UNET_PARTS)
    try:
        return unet.get_submodule(site.path if known else "no such layer")
    except AttributeError as error:
        cause = f"its UNet has no such layer of the kind {site.role}"
        raise UnsupportedModelError("the model has no such edit site", value=site.name, cause=cause) from error


def check_no_linear(sites: list[EditSite]) -> None:
    """Refuse to say what these layers read for a prompt.

    Raises:
        UnsupportedModelError: one of the sites is such a layer.
    """
    for site in sites:
        if site.role in _TAILS:
            raise UnsupportedModelError(
                "what this layer reads depends on the picture, not on the prompt alone",
                value=site.name,
                hint="train it (esd-u), or choose other sites",
            )


def _modules(unet: Any) -> Iterator[tuple[str, nn.Module]]:
    for part in UNET_PARTS:
        block = getattr(unet, part, None)
        if isinstance(block, nn.Module):
            yield from block.named_modules(prefix=part)
