"""Which parts of a model an edit of its text does without, and whether they are there, seen without reading them.

What is wrong with a UNet that nobody has read yet should still be known before an edit is written: a part that is
missing, one that is there as a pickle only, a shard that is not there, a configuration that is no JSON. All of that
shows in the folder's listing and in small files, or in the header of a single-file checkpoint. What does not show is
damage inside the weights; that is found when they are read.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

from diffedit.backends.families import INDEX
from diffedit.backends.tensorfile import open_tensors
from diffedit.errors import MalformedArtifactError, ModelNotFoundError, UnsafeFormatError, nearest

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
NOT_TEXT = ("unet", "vae", "safety_checker", "feature_extractor", "image_encoder")

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_WITHOUT_WEIGHTS = ("feature_extractor",)
_IN_ONE_FILE = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
_VARIANT = re.compile(
    r"(?:model|diffusion_pytorch_model)(?:-\d{5}-of-\d{5})?\.(?P<name>[\w-]+?)(?:-\d{5}-of-\d{5})?\.safetensors"
)
_HINT = "check that all its files are there"


def left_out(pipeline_class: Any) -> dict[str, Any]:
    """Arguments for diffusers' loaders that leave out everything that reads no text."""
    known = inspect.signature(pipeline_class.__init__).parameters
    out: dict[str, Any] = {name: None for name in NOT_TEXT if name in known}
    return out | ({"requires_safety_checker": False} if "requires_safety_checker" in known else {})


def variants(folder: Path) -> tuple[str, ...]:
    """Names of the variants that some part of a pipeline folder is there as: `model.fp16.safetensors` is "fp16"."""
    matches = (_VARIANT.fullmatch(file.name) for file in folder.glob("*/*.safetensors"))
    return tuple(sorted({match["name"] for match in matches if match}))


def check_variant(folder: Path, variant: str) -> None:
    """Raise `ModelNotFoundError` if no part of the folder is there as that variant."""
    known = variants(folder)
    if variant not in known:
        raise ModelNotFoundError(
            "the model has no such variant",
            value=repr(variant),
            cause=f"there are {', '.join(known)}" if known else "it has none: every part is one plain file",
            hint=nearest(variant, known) if known else "leave the variant out",
        )


def check_folder(folder: Path, variant: str | None = None) -> tuple[frozenset[str], list[Path]]:
    """Names of the parts of a pipeline folder that read no text, and their files.

    Args:
        folder: the pipeline.
        variant: weights of that variant count, and plain ones.

    Raises:
        ModelNotFoundError: a part is missing, or its configuration cannot be read.
        UnsafeFormatError: a part's weights are there as a pickle only.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        entries = {name: index.get(name) for name in NOT_TEXT}
    except (OSError, ValueError, AttributeError):
        return frozenset(), []  # the loader says what is wrong with it
    present = [name for name, entry in entries.items() if isinstance(entry, list) and entry and entry[0] is not None]
    files = []
    for name in present:
        part = folder / name
        if not part.is_dir():
            raise ModelNotFoundError("a part of the model is missing", value=repr(name), hint=_HINT)
        files += [path for path in part.iterdir() if path.is_file()]
        if name not in _WITHOUT_WEIGHTS:
            _check_part(part, variant)
    return frozenset(present), files


def check_file(path: Path, config: str | None) -> frozenset[str]:
    """Names of the parts of a single-file checkpoint that read no text.

    Raises:
        ModelNotFoundError: it has no UNet or no VAE, or `config` does not describe them.
    """
    try:
        entries = open_tensors(path).entries
    except (OSError, MalformedArtifactError):
        return frozenset()  # the loader says what is wrong with it
    for name, prefix in _IN_ONE_FILE.items():
        if not any(entry.startswith(prefix) for entry in entries):
            raise ModelNotFoundError(
                f"the checkpoint holds no {name}",
                value=repr(path.name),
                cause=f"no tensor is called {prefix}*",
                hint="give a whole Stable Diffusion checkpoint in the original layout",
            )
        if config is not None and Path(config).is_dir():
            _read_config(Path(config) / name)
    return frozenset(_IN_ONE_FILE)


def _check_part(part: Path, variant: str | None) -> None:
    _read_config(part)
    named = [name.replace(".", f".{variant}.") for name in _WEIGHTS] if variant else []
    for name in (*named, *_WEIGHTS):
        if (part / name).is_file():
            return
        listing = part / (f"{name}.index.json" if name in _WEIGHTS else _index_of(name))
        if listing.is_file():
            try:
                shards = set(json.loads(listing.read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelNotFoundError(
                    "a list of shards cannot be read", value=_place(listing), hint=_HINT
                ) from error
            missing = sorted(shard for shard in shards if not (part / str(shard)).is_file())
            if missing:
                raise ModelNotFoundError("a shard is missing", value=f"{part.name}/{missing[0]}", hint=_HINT)
            return
    if any(path.suffix.lower() in PICKLES for path in part.iterdir()):
        raise UnsafeFormatError(
            "a part of the model is there as a pickle only",
            value=repr(part.name),
            hint="save it again with safe_serialization=True on a machine that you can lose",
        )
    known = variants(part.parent)
    raise ModelNotFoundError(
        "a part of the model has no weights",
        value=repr(part.name),
        cause=f"no {' or '.join(_WEIGHTS)}",
        hint=f"name a variant: {', '.join(known)}" if known else _HINT,
    )


def _index_of(name: str) -> str:
    """`model.fp16.safetensors` -> `model.safetensors.index.fp16.json`, as diffusers calls it."""
    stem, variant, suffix = name.split(".")
    return f"{stem}.{suffix}.index.{variant}.json"


def _read_config(part: Path) -> None:
    file = part / "config.json"
    try:
        good = isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError) as error:
        cause = "it is not there" if isinstance(error, FileNotFoundError) else str(error)
        raise ModelNotFoundError(
            "the configuration of a part cannot be read", value=_place(file), cause=cause, hint=_HINT
        ) from error
    if not good:
        raise ModelNotFoundError("the configuration of a part is no JSON object", value=_place(file), hint=_HINT)


def _place(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"
