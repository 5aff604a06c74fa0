"""What there is to do: the cells of a run, in the order in which they are worth having.

    before    the unedited model's pictures of one concept, which every method is compared with
    tuning    a method, an entry of its grid, an object of `concepts.TUNING`
    objects, styles, colours, facts    a method, default or best setting, one concept
    many      a method, its best setting, several objects in one solve
    cost      a method, default or best setting: seconds beside quickfix's, peak memory

"Best" is the grid entry with the largest harmonic mean of efficacy, generality and both specificities over the tuning
concepts; its cells appear once the method's tuning is complete, and not at all where the default is the best. A
cell's name ends in a hash of all that it depends on, so that runs of other sizes never mix.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.methods.concepts import APART, COLOURS, COUNTS, FACTS, MANY, OBJECTS, SEED, TUNING, TUNING_SEED
from benchmarks.methods.pool import harmonic, pooled
from benchmarks.methods.table import Method, Setting

PARTS = ("tuning", "objects", "styles", "colours", "facts", "many", "cost")
SINGLE = ("objects", "styles", "colours", "facts")
DEFAULT, BEST, BEFORE, TUNED = "default", "best", "before", "tuning"
Record = dict[str, Any]

_PICTURE_SECONDS = 0.33
_GROUPS = 5
_STEPS = 200  # of every training by default


@dataclass(frozen=True)
class Cell:
    """One piece of work.

    Attributes:
        part: one of `PARTS`, the part of the tables that it is for.
        role: `before`, `tuning`, `default` or `best`.
        concepts: what is edited.
        kind: "object", "style", "colour" or "fact".
        images: pictures per group.
        seed: of the first picture of each group.
        method: name in the table; empty for `before`.
        setting: entry of the grid.
    """

    part: str
    role: str
    concepts: tuple[str, ...]
    kind: str
    images: int
    seed: int
    method: str = ""
    setting: Setting = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Name of its file."""
        text = json.dumps(asdict(self), sort_keys=True)
        what = self.concepts[0] if len(self.concepts) == 1 else str(len(self.concepts))
        words = "-".join((self.part, self.role, self.method, what))
        slug = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
        return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    @property
    def ground(self) -> str:
        """The same for all cells that are compared with the same unedited pictures."""
        return json.dumps([self.concepts, self.kind, self.images, self.seed])


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        images: pictures per group and concept, five groups.
        concepts: objects, and facts, that the quick methods are measured on.
        slow_concepts: the same for the slow methods.
        slow_others: styles, colours, and facts, that the slow methods are measured on.
        tuning_images: pictures per group and tuning concept.
        tuning_concepts: objects that settings are tuned on.
        slow_tuning: the same for slow methods.
        counts: how many objects are edited at once.
    """

    images: int = 6
    concepts: int = len(OBJECTS)
    slow_concepts: int = 4
    slow_others: int = 2
    tuning_images: int = 4
    tuning_concepts: int = len(TUNING)
    slow_tuning: int = len(TUNING)
    counts: tuple[int, ...] = COUNTS


def cells(
    methods: Mapping[str, Method], styles: Sequence[str], size: Size, parts: Sequence[str], done: Mapping[str, Record]
) -> list[Cell]:
    """Every cell that is known by now, finished ones included.

    Args:
        methods: what is compared.
        styles: the model's styles.
        size: how much is measured.
        parts: which parts are wanted.
        done: the finished cells' records, by key; tuned settings follow from them.
    """
    found = _tuning(methods, size) if TUNED in parts else []
    chosen = {name: best(name, method, size, done) for name, method in methods.items()}
    listed: dict[str, tuple[str, Sequence[str]]] = {
        "objects": ("object", OBJECTS[: size.concepts]),
        "styles": ("style", styles),
        "colours": ("colour", COLOURS),
        "facts": ("fact", FACTS[: size.concepts]),
    }
    for part, (kind, names) in listed.items():
        if part in parts:
            found += [
                Cell(part, role, (concept,), kind, size.images, SEED + APART * place, name, setting)
                for place, concept in enumerate(names)
                for name, method in methods.items()
                if not method.slow or place < (size.slow_concepts if part == "objects" else size.slow_others)
                for role, setting in _roles(method, chosen[name])
            ]
    if "many" in parts:
        found += [
            Cell("many", role, MANY[:count], "object", max(12, count), SEED, name, setting)
            for count in size.counts
            for name, method in methods.items()
            if method.many
            for role, setting in _roles(method, chosen[name])[-1:]
        ]
    if "cost" in parts:
        found += [
            Cell("cost", role, (concept,), "object", 0, 0, name, setting)
            for place, concept in enumerate(OBJECTS[:3])
            for name, method in methods.items()
            if not place or not method.slow
            for role, setting in _roles(method, chosen[name])
        ]
    return _with_before(found)


def best(name: str, method: Method, size: Size, done: Mapping[str, Record]) -> Setting | None:
    """The best entry of a method's grid, or `None` while its tuning is not complete.

    An entry whose tuning was refused counts as 0; of equal ones the first wins, which is the default. A grid of one
    entry is not tuned.
    """
    if len(method.grid) == 1:
        return method.grid[0]
    scores = []
    for i, setting in enumerate(method.grid):
        records = [done.get(cell.key) for cell in _tuning({name: method}, size) if cell.setting == setting]
        if any(record is None for record in records):
            return None
        scores.append((score([record for record in records if record is not None]), -i))
    return method.grid[-max(scores)[1]]


def score(records: Sequence[Record]) -> float:
    """Harmonic mean of the four shares over some cells; 0 if one is refused."""
    names = ("efficacy", "generality", "specificity_near", "specificity_far")
    found = [pooled(name, records, resamples=0).value for name in names]
    return harmonic([value for value in found if value is not None]) if None not in found else 0.0


def estimate(cell: Cell, method: Method | None) -> float:
    """About how many seconds of one core a cell takes."""
    steps = cell.setting.get("steps", _STEPS) if method is not None and method.slow else _STEPS
    edit = 0.0 if method is None else method.seconds * steps / _STEPS
    if cell.part == "cost":
        return 2 * edit + 10
    return edit + _PICTURE_SECONDS * cell.images * _GROUPS


def _tuning(methods: Mapping[str, Method], size: Size) -> list[Cell]:
    return [
        Cell(TUNED, TUNED, (concept,), "object", size.tuning_images, TUNING_SEED + APART * place, name, setting)
        for place, concept in enumerate(TUNING[: size.tuning_concepts])
        for name, method in methods.items()
        if len(method.grid) > 1 and (not method.slow or place < size.slow_tuning)
        for setting in method.grid
    ]


def _roles(method: Method, chosen: Setting | None) -> list[tuple[str, Setting]]:
    default = method.grid[0]
    roles: list[tuple[str, Setting]] = [(DEFAULT, default)]
    if chosen is not None and chosen != default:
        roles.append((BEST, chosen))
    return roles


def _with_before(found: list[Cell]) -> list[Cell]:
    """The cells with the unedited pictures that they need before each part."""
    out: list[Cell] = []
    for part in dict.fromkeys(cell.part for cell in found):
        mine = [cell for cell in found if cell.part == part]
        grounds = {cell.ground: cell for cell in mine if cell.images}
        out += [Cell(part, BEFORE, c.concepts, c.kind, c.images, c.seed) for c in grounds.values()]
        out += mine
    return out
