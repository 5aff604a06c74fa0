"""Prompts to trace, by attribute, bundled for the bundled model.

The paper traces objects, style, colour and action, and further on viewpoint and count. The bundled model's captions
name one object, a style and a background, so it knows the first three; there are no probes for the others, because an
effect measured on words that a model does not know means nothing.
"""

from __future__ import annotations

import json
from importlib.resources import files

from diffedit.errors import UnknownNameError, nearest

NAMES = ("object", "style", "colour")


def load_probes(name: str) -> tuple[tuple[str, str], ...]:
    """(prompt, subject) pairs of one attribute.

    Args:
        name: "object", "style" or "colour".

    Raises:
        UnknownNameError: no such set.
    """
    if name not in NAMES:
        raise UnknownNameError("there is no probe set of that name", value=repr(name), hint=nearest(name, NAMES))
    found = json.loads((files("diffedit") / "assets" / "probes.json").read_text(encoding="utf-8"))
    return tuple((str(prompt), str(subject)) for prompt, subject in found[name])
