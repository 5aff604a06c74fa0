"""How the time and the memory of an edit grow from small parts of it, which were tried, to the whole.

Time: a + b p + c r min(r, d) for p prompts and r rows of keys of width d. Each weight is tried, hashed and written;
each prompt is a pass of the model; a solve of r equations in d unknowns is quadratic in the smaller number.

Memory is a peak, the largest of three, and the one that counts for the whole may be hidden in a part under another. So
each is measured by itself and grows by its own law. With P the bytes of the pairs that are kept:

    reading      P + a + b min(p, `PROMPTS`)     prompts are read in portions of so many
    solving      P + 5 P + a + b min(r, d)       the pairs in float64, weighted, their products; matrices d x d
    finishing    P + a + b min(r, d)             the trial, hashes and the write

P is in proportion to the rows. These are bytes of live tensors; a process grows by more, since its allocator keeps
freed blocks of other sizes: `HELD` times as much, where 1.1 to 2.1 was measured with glibc.

Limits: what is set up once per model (hashes, the second moment of everyday captions) is tried before the parts are
measured and is not in either figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffedit.edit import Edit
from diffedit.metering import extrapolate
from diffedit.pairs import MANY
from diffedit.request import Request
from diffedit.updaters.tokens import PROMPTS

HELD = 1.5
_SINGLE = 4  # bytes of a float32 number


@dataclass(frozen=True)
class Peaks:
    """Most bytes of tensors that were live at once, in each phase of an edit."""

    reading: int
    solving: int
    finishing: int


@dataclass(frozen=True, eq=False)
class Part:
    """A part of the work that was done."""

    requests: tuple[Request, ...]
    prompts: int
    seconds: float
    memory: Peaks
    edit: Edit


def count_prompts(requests: Sequence[Request]) -> int:
    """Prompts that have to be run: targets, names and preserved names in their templates, the latter once each."""
    edited = {name.casefold() for request in requests for name in request.names}
    held = {
        (name.casefold(), request.templates)
        for request in requests
        for name in request.preserve
        if name.casefold() not in edited
    }
    asked = sum(len(request.templates) * (1 + len(request.names)) for request in requests)
    return asked + sum(len(templates) for _, templates in held)


def count_couples(requests: Sequence[Request]) -> int:
    """Prompts about subjects, each of which is paired with one about its target."""
    return sum(len(request.templates) * len(request.names) for request in requests)


def count_held(requests: Sequence[Request]) -> int:
    """Preserved names, each once per set of templates."""
    return len({(name.casefold(), request.templates) for request in requests for name in request.preserve})


def grown(parts: Sequence[Part], counts: Sequence[int], share: float) -> float:
    """A count of the last part, in the whole: grows as it grew between the last parts, at most in proportion.

    Args:
        parts: the parts.
        counts: one per part.
        share: couples of the whole over those of the last part.
    """
    power = 1.0
    if len(parts) > 1 and 0 < counts[-2] < counts[-1]:
        ratio = count_couples(parts[-1].requests) / count_couples(parts[-2].requests)
        power = min(1.0, math.log(counts[-1] / counts[-2]) / math.log(ratio)) if ratio > 1 else 1.0
    return counts[-1] * float(share**power)


@dataclass(frozen=True)
class _Size:
    """How large a part, or the whole, is.

    Attributes:
        prompts: that are run.
        rows: of keys, asked for and held, at one site on average.
        pairs: bytes of all sites' pairs.
    """

    prompts: int
    rows: float
    pairs: float


def expected(parts: Sequence[Part], requests: Sequence[Request], width: int) -> tuple[float, int]:
    """Seconds of the whole, and the bytes that the process grows by.

    Args:
        parts: at least one.
        requests: the whole.
        width: numbers in a key.
    """
    last, prompts = parts[-1], count_prompts(requests)
    if last.prompts == prompts:
        return last.seconds, round(HELD * max(last.memory.reading, last.memory.solving, last.memory.finishing))
    sizes = [_size(part) for part in parts]
    share = count_couples(requests) / count_couples(last.requests)
    kept = count_held(requests) / max(1, count_held(last.requests))
    asked, held = _rows(last)
    rows = grown(parts, [_rows(part)[0] for part in parts], share) + held * kept
    sites = max(1, len(last.edit.delta.pairs or {}))
    pairs = sizes[-1].pairs * rows / max(1, asked + held)
    whole = _Size(prompts, rows / sites, pairs)
    timed = [(1.0, float(size.prompts), size.rows * min(size.rows, width)) for size in sizes]
    wanted = (1.0, float(whole.prompts), whole.rows * min(whole.rows, width))
    seconds = extrapolate(timed, [part.seconds for part in parts], wanted)
    peaks = [
        _peak(sizes, [part.memory.reading for part in parts], whole, 1, PROMPTS, None),
        _peak(sizes, [part.memory.solving for part in parts], whole, 6, None, width),
        _peak(sizes, [part.memory.finishing for part in parts], whole, 1, None, width),
    ]
    return seconds, round(HELD * max(peaks))


def _peak(
    sizes: Sequence[_Size], seen: Sequence[int], whole: _Size, copies: int, prompts: int | None, rows: int | None
) -> float:
    """One phase's peak: so many times the pairs, and what grows with prompts or rows up to a most."""

    def features(size: _Size) -> tuple[float, float]:
        return 1.0, float(min(size.prompts, prompts)) if prompts else min(size.rows, rows or 0)

    rest = [max(1.0, peak - copies * size.pairs) for peak, size in zip(seen, sizes, strict=True)]
    return copies * whole.pairs + extrapolate([features(size) for size in sizes], rest, features(whole))


def _rows(part: Part) -> tuple[int, int]:
    """Rows of keys that are asked for and that are held, over all sites."""
    pairs = (part.edit.delta.pairs or {}).values()
    asked = sum(len(entry.keys) for at_site in pairs for entry in at_site.wanted)
    return asked, sum(len(entry.keys) for at_site in pairs for entry in at_site.held)


def _size(part: Part) -> _Size:
    pairs = part.edit.delta.pairs or {}
    tensors = {
        tensor.data_ptr(): tensor.nbytes  # sites may share their keys
        for at_site in pairs.values()
        for tensor in (
            *(tensor for held in at_site.held for tensor in (held.keys, held.spread)),
            *(tensor for asked in at_site.wanted for tensor in (asked.keys, asked.residuals, asked.spread)),
        )
        if tensor is not None
    }
    return _Size(part.prompts, sum(_rows(part)) / max(1, len(pairs)), sum(tensors.values()))


def stored_pairs(edit: Edit, share: float, held: float) -> int:
    """Bytes of the numbers that the whole's pairs are saved as, in float32.

    Args:
        edit: the last part's.
        share: of what is asked for in the whole, over the part's.
        held: likewise of what is held.
    """
    numbers = 0.0
    for pairs in (edit.delta.pairs or {}).values():
        for entries, times in ((pairs.wanted, share), (pairs.held, held)):
            numbers += times * sum(entry.keys.numel() for entry in entries)
        numbers += share * sum(entry.residuals.numel() for entry in pairs.wanted)
        if pairs.metric:
            width = pairs.wanted[0].keys.shape[1]
            rows = [sum(len(entry.keys) for entry in entries) for entries in (pairs.wanted, pairs.held)]
            whole = share * rows[0] + held * rows[1]
            numbers += width * (whole if whole <= MANY * width else width)  # beyond, the metric itself
    return round(_SINGLE * numbers)
