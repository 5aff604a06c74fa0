"""What lies inside the package: the bundled models and their judges, found by `builtin:<name>`.

Models that differ in their text encoder alone share a folder: the second is a diffusers variant of the first.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from diffedit.errors import UnknownNameError, nearest

PREFIX = "builtin:"
BUNDLED: dict[str, tuple[str, ...]] = {"model": ("emoji", "emoji-facts"), "scorer": ("emoji-scorer",)}
_VARIANTS = {"emoji-facts": ("emoji", "facts")}


def bundled(kind: Literal["model", "scorer"], name: str) -> Path:
    """The folder of `builtin:<name>`.

    Raises:
        UnknownNameError: nothing of that kind has the name.
    """
    short = name.removeprefix(PREFIX)
    if short not in BUNDLED[kind]:
        hint = nearest(short, BUNDLED[kind])
        raise UnknownNameError(f"there is no built-in {kind} of that name", value=repr(short), hint=hint)
    return Path(str(files("diffedit"))) / "assets" / _VARIANTS.get(short, (short,))[0]


def bundled_variant(name: str) -> str | None:
    """Which variant in its folder `builtin:<name>` is; `None` for the plain files.

    >>> bundled_variant("builtin:emoji-facts")
    'facts'
    """
    return _VARIANTS.get(name.removeprefix(PREFIX), (name, None))[1]


def bundled_name(name: str, variant: str | None) -> str:
    """What a variant of a built-in model is called, if it has a name of its own.

    >>> bundled_name("builtin:emoji", "facts")
    'builtin:emoji-facts'
    """
    place = name.removeprefix(PREFIX), variant
    return next((PREFIX + short for short, there in _VARIANTS.items() if there == place), name)
