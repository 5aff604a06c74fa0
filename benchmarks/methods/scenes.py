"""What is drawn for a cell, and who names it.

Objects and styles take the suite of `diffedit evaluate`. Colours are no kind of their own there, so their suite is made
here, with the same groups: the prompts of the edit, unseen ones, the other colours (near), objects without a word about
the background (far), everyday prompts. A background's colour is measured, not guessed: the median of a border of
`BORDER` pixels, named after the model's own colour if it is within `TOLERANCE` of it (RGB distance; two of the colours
differ by 95 at least), else "other".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL.Image import Image

from benchmarks.methods.concepts import COLOURS, colour_compositions, colour_target
from benchmarks.methods.plan import Cell
from diffedit.bundled import bundled
from diffedit.evaluate import prompts, suite
from diffedit.evaluate.judge import Judge, captions
from diffedit.evaluate.records import Group, Settings
from diffedit.evaluate.suite import Job, Suite
from diffedit.interfaces import Vocabulary
from diffedit.request import Request
from diffedit.text import with_article

COLOUR = "colour"
OTHER = "other"
BORDER, TOLERANCE = 3, 45.0
_FAR = 16


def scene(cell: Cell, requests: Sequence[Request], vocabulary: Vocabulary, judge: Judge) -> Suite:
    """The pictures of a cell."""
    if cell.kind == COLOUR:
        return _colours(cell, requests[0], vocabulary)
    return suite.build(requests, vocabulary, judge, Settings(images=cell.images, seed=cell.seed))


def border_colour(image: Image) -> tuple[float, ...]:
    """Median red, green and blue of a picture's border."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    inner = np.zeros(pixels.shape[:2], dtype=bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    return tuple(float(value) for value in np.median(pixels[~inner], axis=0))


def name_colour(image: Image) -> str:
    """The colour of a picture's background, among those that the model knows."""
    found = np.array(border_colour(image))
    near = {name: float(np.linalg.norm(found - np.array(value))) for name, value in model_colours().items()}
    nearest = min(near, key=lambda name: near[name])
    return nearest if near[nearest] <= TOLERANCE else OTHER


@cache
def model_colours() -> dict[str, tuple[float, ...]]:
    """The colours that the model was trained with."""
    found = _vocabulary_file()["backgrounds"]
    return {name: tuple(found[name]) for name in COLOURS}


def model_styles() -> tuple[str, ...]:
    """The styles that the model was trained with, read without loading it."""
    return tuple(_vocabulary_file()["styles"])


def _vocabulary_file() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundled("model", "builtin:emoji") / "vocabulary.json").read_bytes())
    return found


def _colours(cell: Cell, request: Request, vocabulary: Vocabulary) -> Suite:
    colour = request.subject
    others = [name for name in COLOURS if name != colour]
    known = vocabulary.objects
    objects = [known[(i * prompts.stride(len(known))) % len(known)] for i in range(min(_FAR, len(known)))]
    plans: dict[Group, list[tuple[str, str, tuple[str, ...]]]] = {
        "efficacy": [(colour, suite.EDIT, _filled(request.templates, colour))],
        "generality": [(colour, kind, _filled(texts, colour)) for kind, texts in colour_compositions().items()],
        "near": [(name, "other colours", _filled(request.templates, name)) for name in others],
        "far": [(name, suite.OTHERS, (f"a picture of {with_article(name)}", with_article(name))) for name in objects],
        "everyday": [
            ("", "everyday prompts", (text,)) for text in prompts.everyday(vocabulary, (colour,), cell.images)
        ],
    }
    jobs = []
    for group, parts in plans.items():
        for i in range(cell.images):
            turn, which = divmod(i, len(parts))
            name, kind, texts = parts[which]
            space: Any = "object" if group == "far" else COLOUR
            jobs.append(Job(group, name, kind, space, texts[(turn + which) % len(texts)], cell.seed + i))
    labels: Any = {"object": captions("object", known)}
    return Suite(tuple(jobs), labels, {colour: (colour_target(colour),)}, frozenset())


def _filled(templates: Sequence[str], colour: str) -> tuple[str, ...]:
    return tuple(template.format(colour) for template in templates)
