"""Which pipeline class of diffusers opens a model, read from its files before any weight is.

Diffusers' loaders build the class that they are called on, whatever the files hold: called on the wrong class they
fail with a message about missing components, or worse, load half of a model. A folder names its class in
`model_index.json`; a single file does not, but only Stable Diffusion XL names a second text encoder
`conditioner.embedders.1`. Inpainting and image-to-image variants share their family's text encoders and open as the
family's text-to-image pipeline. What is neither is left to `StableDiffusionPipeline`, which says what it misses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffedit.backends.tensorfile import open_tensors
from diffedit.errors import DiffEditError

INDEX = "model_index.json"
_XL = "StableDiffusionXL"
_SECOND_ENCODER = "conditioner.embedders.1."


def pipeline_class(path: Path) -> Any:
    """The class for a pipeline folder, or for a `.safetensors` checkpoint in the original layout.

    Args:
        path: the folder or the file; what cannot be read is left to the loader to report.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline if is_xl(path) else StableDiffusionPipeline


def is_xl(path: Path) -> bool:
    """Whether the files say that they hold a Stable Diffusion XL model."""
    if path.is_dir():
        try:
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        name = index.get("_class_name") if isinstance(index, dict) else None
        return isinstance(name, str) and name.startswith(_XL)
    try:
        return any(name.startswith(_SECOND_ENCODER) for name in open_tensors(path).entries)
    except (OSError, DiffEditError):
        return False
