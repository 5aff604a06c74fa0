"""Plots as files: what every plot checks before it is drawn, and how it is written."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from diffedit.errors import RequestError, StorageError, UnsupportedModelError

_SUFFIXES = (".png", ".svg", ".pdf")


def new_figure(path: Path, width: float, height: float) -> Any:
    """An empty matplotlib figure in inches for a file of that name.

    Raises:
        RequestError: no .png, .svg or .pdf file.
        UnsupportedModelError: matplotlib is not installed.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise RequestError("a plot is a .png, .svg or .pdf file", value=repr(path.name))
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedModelError(
            "plots need matplotlib", hint="install it with: python -m pip install 'diffedit[eval]'"
        )
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def write_figure(figure: Any, path: Path) -> Path:
    """Write it, making the folder if there is none.

    Raises:
        StorageError: the file system refused.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise StorageError("the plot cannot be written", value=repr(str(path)), cause=str(error)) from error
    return path
