"""The names that one layer has in the files of different programs, and which model names are safe to publish.

A site's canonical path is the nested one (`text_model.encoder.layers.0.self_attn.out_proj`), as in Stable Diffusion's
files:

    edit file   text_encoder.text_model.encoder.layers.0.self_attn.out_proj.up / .down
    flat        encoder.layers.0.self_attn.out_proj                     modules of transformers >= 5.6
    kohya       lora_te_text_model_encoder_layers_0_self_attn_out_proj
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from diffedit.errors import UnsupportedModelError
from diffedit.site import EditSite

UP, DOWN = ".up", ".down"

# kohya's prefix per pipeline component. A UNet will be "lora_unet"; the encoders of SDXL are "lora_te1" and "lora_te2".
KOHYA_PREFIX: Mapping[str, str] = {"text_encoder": "lora_te"}

_NESTING = "text_model."
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")


def tensor_names(name: str) -> tuple[str, str]:
    """Names of `up` and `down` in the edit file, for an `EditSite.name`."""
    return name + UP, name + DOWN


def kohya_name(site: EditSite) -> str:
    """The module's name in kohya's files.

    Raises:
        UnsupportedModelError: no adapter layout is known for the component.
    """
    return f"{KOHYA_PREFIX[_known(site).component]}_{site.path.replace('.', '_')}"


def flat_path(site: EditSite) -> str:
    """The module's path in a text encoder of transformers >= 5.6, which lost the level `text_model`.

    Raises:
        UnsupportedModelError: the component is not a text encoder, or its path is not nested.
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
            "adapter files can hold edits of the text encoder only",
            value=site.name,
            hint="use the edit file, or export the merged model",
        )
    if not site.path.startswith(_NESTING):
        raise UnsupportedModelError(
            "the site's path is not the canonical one", value=site.name, cause=f"it does not start with {_NESTING!r}"
        )
    return site
