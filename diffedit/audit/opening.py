"""A base to look at: its backend without an editor, and with the text encoder alone where that is enough."""

from __future__ import annotations

from typing import Any

import torch

from diffedit import registry
from diffedit.backends.loading import load_model
from diffedit.errors import UnsupportedModelError
from diffedit.interfaces import Backend


def open_backend(
    model: Any,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | None = None,
    config: str | None = None,
    text_only: bool = False,
) -> Backend:
    """The one backend that accepts the model; arguments are those of `load_model`.

    Raises:
        UnsupportedModelError: no backend accepts it, or several do.
        DiffEditError: it cannot be loaded.
    """
    loaded = load_model(model, dtype=dtype, revision=revision, token=token, config=config, text_only=text_only)
    accepting = [cls for cls in registry.backends() if cls.accepts(loaded.pipeline)]
    if len(accepting) != 1:
        raise UnsupportedModelError(
            "no backend accepts the model" if not accepting else "several backends accept the model",
            value=f"{type(loaded.pipeline).__name__} from {loaded.source!r}",
            hint="see `diffedit list`; a plugin can add a family",
        )
    return accepting[0](loaded)
