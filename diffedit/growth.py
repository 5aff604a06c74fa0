"""How the time and the memory of an edit grow from small parts of it, which were tried, to the whole.

Time: a + b p + c (r d m + e m^3) for p prompts and r rows of keys of width d, m = min(r, d). Each weight is tried,
hashed and written; each prompt is a pass of the model; a solve multiplies r x d by itself and decomposes an m x m
matrix, with e = 10 for the eigenvalues that a metric needs, else 1/3. Beyond d rows all of it is linear in p, and b
falls with p, for prompts share tokens: a part that is so large, and the one before it, give the slope.

Memory is a peak, the largest of three, and the one that counts for the whole may be hidden in a part under another. So
each is measured by itself and grows by its own law. With P the bytes of the pairs that are kept:

    reading              P + a min(p, `PROMPTS`)^b       b <= 1: prompts share tokens, and are read in such portions
    solving              P + 5 P + a + b min(r, d)       the pairs in float64, weighted, their products; matrices d x d
    solving in blocks    P + B + a + b min(r, d)         for more than `MANY` rows per dimension, where the method can
    finishing            P + a + b min(r, d)             the trial, hashes and the write

B is `_BLOCKS` blocks of keys and residuals in float64; rows that go in blocks keep no spreads: P is smaller then. P is
in proportion to the rows. These are bytes of live tensors; a process grows by more, since its allocator keeps
freed blocks of other sizes: `HELD` times as much, where 1.1 to 2.1 was measured with glibc.

Limits: what is set up once per model (hashes, the second moment of everyday captions) is tried before the parts are
measured and is not in either figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffedit.edit import Edit
from diffedit.metering import extrapolate
from diffedit.pairs import BLOCK, MANY, Pairs
from diffedit.request import Request, held_names
from diffedit.updaters.tokens import PROMPTS

HELD = 1.5
_SINGLE, _DOUBLE = 4, 8  # bytes of a number
_BLOCKS = 2.5  # of keys and residuals at once


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
    held = {(name.casefold(), request.templates) for request, name in held_names(requests)}
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
        blocks: bytes of the blocks in which rows are solved; 0 if all are solved at once.
    """

    prompts: int
    rows: float
    pairs: float
    blocks: float = 0.0


def expected(parts: Sequence[Part], requests: Sequence[Request], width: int, in_blocks: bool) -> tuple[float, int]:
    """Seconds of the whole, and the bytes that the process grows by.

    Args:
        parts: at least one.
        requests: the whole.
        width: numbers in a key.
        in_blocks: whether the updater solves many rows some at a time; see `Updater.in_blocks`.
    """
    last, prompts = parts[-1], count_prompts(requests)
    if last.prompts == prompts:
        return last.seconds, round(HELD * max(last.memory.reading, last.memory.solving, last.memory.finishing))
    sizes = [_size(part, in_blocks) for part in parts]
    share = count_couples(requests) / count_couples(last.requests)
    kept = count_held(requests) / max(1, count_held(last.requests))
    asked, held = _rows(last)
    rows = grown(parts, [_rows(part)[0] for part in parts], share) + held * kept
    sites = max(1, len(last.edit.delta.pairs or {}))
    pairs = sizes[-1].pairs * rows / max(1, asked + held)
    blocks = _blocks(last.edit, rows / sites, width, in_blocks)
    if blocks and not sizes[-1].blocks:
        pairs *= 1 - _spreads(last.edit) / max(1.0, sizes[-1].pairs)
    whole = _Size(prompts, rows / sites, pairs, blocks)
    cubic = 10.0 if any(at_site.metric for at_site in (last.edit.delta.pairs or {}).values()) else 1 / 3
    seconds = _seconds(sizes, [part.seconds for part in parts], whole, width, cubic)
    peaks = [
        _reading(sizes, [part.memory.reading for part in parts], whole),
        _peak(sizes, [part.memory.solving for part in parts], whole, _solving, width),
        _peak(sizes, [part.memory.finishing for part in parts], whole, _kept, width),
    ]
    return seconds, round(HELD * max(peaks))


def _seconds(sizes: Sequence[_Size], took: Sequence[float], whole: _Size, width: int, cubic: float) -> float:
    """By the law of the module's text, or, where all is linear, by the last two parts, which know the slope best."""
    if len(sizes) > 1 and sizes[-1].rows >= width:
        slope = (took[-1] - took[-2]) / (sizes[-1].prompts - sizes[-2].prompts)
        return took[-1] + max(0.0, slope) * (whole.prompts - sizes[-1].prompts)
    timed = [(1.0, float(size.prompts), _products(size.rows, width, cubic)) for size in (*sizes, whole)]
    return extrapolate(timed[:-1], took, timed[-1])


def _products(rows: float, width: int, cubic: float) -> float:
    """Multiplications of a solve, about."""
    least = min(rows, width)
    return rows * width * least + cubic * least**3


def _kept(size: _Size) -> float:
    return size.pairs


def _solving(size: _Size) -> float:
    return size.pairs + size.blocks if size.blocks else 6 * size.pairs


def _reading(sizes: Sequence[_Size], seen: Sequence[int], whole: _Size) -> float:
    """The peak of reading: what is kept, and what grows as it grew between the last parts, at most in proportion."""
    rest = [max(1.0, peak - size.pairs) for peak, size in zip(seen, sizes, strict=True)]
    prompts = [min(size.prompts, PROMPTS) for size in (*sizes, whole)]
    power = 1.0
    if len(rest) > 1 and prompts[-2] > prompts[-3]:
        power = math.log(rest[-1] / rest[-2]) / math.log(prompts[-2] / prompts[-3])
    return whole.pairs + rest[-1] * float((prompts[-1] / prompts[-2]) ** min(1.0, max(0.0, power)))


def _peak(
    sizes: Sequence[_Size], seen: Sequence[int], whole: _Size, certain: Callable[[_Size], float], width: int
) -> float:
    """Another phase's peak: what it certainly holds, and what grows with the rows up to `width`."""
    rest = [max(1.0, peak - certain(size)) for peak, size in zip(seen, sizes, strict=True)]
    features = [(1.0, min(size.rows, width)) for size in (*sizes, whole)]
    return certain(whole) + extrapolate(features[:-1], rest, features[-1])


def _blocks(edit: Edit, rows: float, width: int, in_blocks: bool) -> float:
    """Bytes of the blocks that so many rows per site are solved in; 0 if they are solved at once."""
    if not in_blocks or rows <= MANY * width:
        return 0.0
    most = max(sum(_widths(at_site)) for at_site in (edit.delta.pairs or {}).values())
    return float(_BLOCKS * min(rows, BLOCK) * most * _DOUBLE)


def _widths(pairs: Pairs) -> tuple[int, int]:
    first = pairs.wanted[0]
    return first.keys.shape[1], first.residuals.shape[1]


def _spreads(edit: Edit) -> float:
    return float(sum(part.nbytes for pairs in (edit.delta.pairs or {}).values() for part in pairs.spread_parts()))


def _rows(part: Part) -> tuple[int, int]:
    """Rows of keys that are asked for and that are held, over all sites."""
    pairs = (part.edit.delta.pairs or {}).values()
    asked = sum(len(entry.keys) for at_site in pairs for entry in at_site.wanted)
    return asked, sum(len(entry.keys) for at_site in pairs for entry in at_site.held)


def _size(part: Part, in_blocks: bool) -> _Size:
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
    rows = sum(_rows(part)) / max(1, len(pairs))
    width = max((_widths(at_site)[0] for at_site in pairs.values()), default=1)
    return _Size(part.prompts, rows, sum(tensors.values()), _blocks(part.edit, rows, width, in_blocks))


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
