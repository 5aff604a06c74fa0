"""A pipeline without its progress bar, for as long as diffedit uses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """No progress bar inside the block; the pipeline's own setting comes back afterwards."""
    missing = object()
    before = getattr(pipeline, "_progress_bar_config", missing)
    try:
        pipeline.set_progress_bar_config(disable=True)
        yield
    finally:
        if before is missing:
            del pipeline._progress_bar_config
        else:
            pipeline._progress_bar_config = before
