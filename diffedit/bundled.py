"""What lies inside the package: the bundled models and their judges, found by `builtin:<name>`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from diffedit.errors import UnknownNameError, nearest

PREFIX = "builtin:"
BUNDLED: dict[str, tuple[str, ...]] = {"model": ("emoji",), "scorer": ("emoji-scorer",)}


def bundled(kind: Literal["model", "scorer"], name: str) -> Path:
    """The folder of `builtin:<name>`.

    Raises:
        UnknownNameError: nothing of that kind has the name.
    """
    short = name.removeprefix(PREFIX)
    if short not in BUNDLED[kind]:
        hint = nearest(short, BUNDLED[kind])
        raise UnknownNameError(f"there is no built-in {kind} of that name", value=repr(short), hint=hint)
    return Path(str(files("diffedit"))) / "assets" / short
