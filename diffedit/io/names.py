"""The names that one layer has in the files of different programs, and which model names are safe to publish.

A site's canonical path is the nested one (`text_model.encoder.layers.0.self_attn.out_proj`), as in Stable Diffusion's
files:

    edit file   text_encoder.text_model.encoder.layers.0.self_attn.out_proj.up / .down
    flat        encoder.layers.0.self_attn.out_proj                     modules of transformers >= 5.6
    kohya       lora_te_text_model_encoder_layers_0_self_attn_out_proj

Stable Diffusion XL has two text encoders. Its second, `text_encoder_2`, has the same paths; kohya calls the two
`lora_te1` and `lora_te2`, and so the first has another name there than the only encoder of the other families. In the
UNet it is diffusers' own name, which never changed (`mid_block.attentions.0.transformer_blocks.0.attn2.to_k`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from diffedit.errors import UnsupportedModelError
from diffedit.site import EditSite

UP, DOWN = ".up", ".down"

# kohya's prefix per pipeline component.
KOHYA_PREFIX: Mapping[str, str] = {"text_encoder": "lora_te", "text_encoder_2": "lora_te2", "unet": "lora_unet"}

_NESTING = "text_model."
_SECOND, _XL = "text_encoder_2", "sdxl"
_CANONICAL = {
    "text_encoder": (_NESTING,),
    _SECOND: (_NESTING,),
    "unet": ("down_blocks.", "mid_block.", "up_blocks."),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")


def tensor_names(name: str) -> tuple[str, str]:
    """Names of `up` and `down` in the edit file, for an `EditSite.name`."""
    return name + UP, name + DOWN


def is_xl(sites: Iterable[EditSite], backend: str) -> bool:
    """Whether an edit of these sites, made by this backend, is one of a model with two text encoders."""
    return backend == _XL or any(site.component == _SECOND for site in sites)


def kohya_name(site: EditSite, *, xl: bool = False) -> str:
    """The module's name in kohya's files.

    Args:
        site: an edit site.
        xl: whether its model has two text encoders; see `is_xl`.

    Raises:
        UnsupportedModelError: no adapter layout is known for the component.
    """
    prefix = KOHYA_PREFIX[_known(site).component]
    return f"{prefix + '1' if xl and site.component == 'text_encoder' else prefix}_{site.path.replace('.', '_')}"


def flat_path(site: EditSite) -> str:
    """The module's path as transformers >= 5.6 has it: the text encoder lost the level `text_model`, the UNet nothing.

    Raises:
        UnsupportedModelError: no adapter layout is known for the component, or the path is not the canonical one.
    """
    return _known(site).path.removeprefix(_NESTING)


def hub_id(source: str) -> str | None:
    """`source` if it reads as a Hub id ("user/name"), else `None`: a path of somebody's machine is not for publishing.

    >>> hub_id("runwayml/stable-diffusion-v1-5")
    'runwayml/stable-diffusion-v1-5'
    >>> hub_id("/home/me/model") is None
    True
    """
    ok = _HUB_ID.fullmatch(source) and not source.endswith((".safetensors", ".ckpt", ".git", "/"))
    return source if ok and ".." not in source and "--" not in source else None


def _known(site: EditSite) -> EditSite:
    if site.component not in KOHYA_PREFIX:
        raise UnsupportedModelError(
            "adapter files can hold edits of the text encoders and the UNet only",
            value=site.name,
            hint="use the edit file, or export the merged model",
        )
    if not site.path.startswith(_CANONICAL[site.component]):
        raise UnsupportedModelError(
            "the site's path is not the canonical one",
            value=site.name,
            cause=f"it does not start with {' or '.join(map(repr, _CANONICAL[site.component]))}",
        )
    return site
