"""How two copies of one tensor differ: not at all, by rounding only, or by a change of some size and rank.

With W the base, E the edited tensor, both as stored, and D = E - W in float64:

    rounding    one is the other rounded to a narrower dtype, to the bit; or |D| stays within half a step of each
                dtype everywhere *and* D has no singular value above the noise floor
    floor       2 (max row norm + max column norm of s), s = standard deviation of the rounding error of each entry,
                half a step / sqrt(3): twice about the largest singular value that rounding alone causes
    rank        number of singular values of D above the floor

The floor follows from the spectral norm of a matrix of independent errors (Bandeira and van Handel 2016, theorem 3.1);
the factor covers that errors of a small change are not quite independent of it. Steps are those of the narrowest of
float16, bfloat16 and the stored dtype that holds every number of the tensor. E is rounded in any case. W is only if it
is a rounded copy of what was edited; then D is full of its errors, so if the floor of E alone gives a low rank, W is
exact and that floor holds, else the floor of both does.

Only the rows and columns in which the copies differ count. Convolutions are taken as [out, in x height x width].
Matrices with both sides over `PROBE` are probed with that many random directions first: a low rank is found exactly
that way. With both sides over `EXACT` a high rank is reported as "at least", from a part of the matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

EXACT = 1024
PROBE = 144
SURE = 128  # the highest rank that a probe of `PROBE` directions may report
KEPT_VALUES = 8

_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
_NARROW = (torch.float32, torch.bfloat16, torch.float16, *_EIGHT_BITS)

State = Literal["changed", "rounding", "not finite"]


@dataclass(frozen=True, eq=False)
class Change:
    """The difference of one tensor.

    Attributes:
        state: "changed", "rounding" (by rounding only) or "not finite" (NaN or infinity that are not in both alike).
        norm: |D|, Frobenius.
        relative_norm: |D| / |W|; `None` if W is zero.
        rows: number of rows in which the copies differ.
        rank: effective rank of D; `None` for vectors, whole numbers and what is not finite.
        rank_is_bound: `rank` is the least that it can be.
        floor: largest singular value that rounding explains.
        singular_values: the largest ones of D, at most `KEPT_VALUES`; none for vectors.
        inputs: [rank, d_in], right singular vectors of D times singular values, of Frobenius norm 1: which inputs the
            change acts on, and how much; `None` unless asked for.
    """

    state: State
    norm: float = 0.0
    relative_norm: float | None = None
    rows: int = 0
    rank: int | None = None
    rank_is_bound: bool = False
    floor: float = 0.0
    singular_values: tuple[float, ...] = ()
    inputs: Tensor | None = None


def compare(base: Tensor, edited: Tensor, *, want_inputs: bool = False) -> Change | None:
    """The difference of two tensors of one shape, or `None` if they hold the same numbers.

    Args:
        base: as stored.
        edited: as stored, perhaps in another dtype.
        want_inputs: fill `Change.inputs`.
    """
    kinds = [values.dtype for values in (base, edited)]
    base, edited = _plain(base), _plain(edited)
    if not all(kind.is_floating_point for kind in kinds):
        gap = edited.double() - base.double()
        return Change("changed", rows=_differing_rows(gap)) if bool(gap.any()) else None
    if not (_finite(base) and _finite(edited)):
        bad = (~edited.isfinite()).reshape(edited.shape[0], -1).any(1)
        return None if _same_with_nan(base, edited) else Change("not finite", rows=int(bad.sum()))
    differ = (base.to(_wider(base, edited)) != edited.to(_wider(base, edited))).reshape(base.shape[0], -1)
    rows, columns = differ.any(1), differ.any(0)
    count = int(rows.sum())
    if not count:
        return None
    weight = float(torch.linalg.vector_norm(base, dtype=torch.float64))
    vector = base.ndim < 2
    cast = _is_cast(base, edited)
    kinds = [_precision(values, kind) for values, kind in zip((base, edited), kinds, strict=True)]
    width = columns.numel()
    base, edited = (_as_matrix(values)[rows][:, columns] for values in (base, edited))
    change = edited.double() - base.double()
    norm = float(torch.linalg.vector_norm(change))
    relative = norm / weight if weight else None
    if cast:
        return Change("rounding", norm, relative, count)
    errors = [_half_step(values, kind).square_().div_(3) for values, kind in ((base, kinds[0]), (edited, kinds[1]))]
    bounded = bool((change.abs() <= ((3 * errors[0]).sqrt() + (3 * errors[1]).sqrt()) * (1 + 1e-5)).all())
    floors = _floor(errors[1]), _floor(errors[0].add_(errors[1]))
    del errors
    found = _spectrum(change, floors, vectors=want_inputs)
    floor = found.floor
    rank = int((found.values > floor).sum())
    if bounded and rank == 0 and not found.partial:
        return Change("rounding", norm, relative, count, floor=floor)
    if vector:
        return Change("changed", norm, relative, count, floor=floor)
    inputs = None
    if found.right is not None and rank:
        inputs = found.right.new_zeros(rank, width)
        inputs[:, columns] = found.values[:rank, None] * found.right[:rank]
        inputs /= torch.linalg.vector_norm(inputs)
    largest = tuple(float(value) for value in found.values[:KEPT_VALUES])
    return Change("changed", norm, relative, count, rank, found.partial, floor, largest, inputs)


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """Singular values, largest first; the floor that holds; whether there are more; right singular vectors as rows."""

    values: Tensor
    floor: float
    partial: bool = False
    right: Tensor | None = None


def _spectrum(part: Tensor, floors: tuple[float, float], *, vectors: bool) -> _Spectrum:
    """The spectrum of a difference; `floors` is that of the edited copy alone, and that of both."""
    if min(part.shape) > PROBE:
        some = torch.linalg.svdvals(_corner(part))  # a part of a matrix has no higher rank than the matrix
        high = int((some > floors[1]).sum()) > SURE
        if high and min(part.shape) > EXACT:
            return _Spectrum(some, floors[1], partial=True)
        found = None if high else _probe(part, floors)
        if found is not None:
            return found
    right = None
    if vectors:
        _, values, right = torch.linalg.svd(part, full_matrices=False)
    else:
        tall = part if part.shape[0] >= part.shape[1] else part.T
        core = torch.linalg.qr(tall, mode="r").R if tall.shape[0] > 2 * tall.shape[1] else tall
        values = torch.linalg.svdvals(core)
    low = int((values > floors[0]).sum()) * 2 <= min(part.shape)
    # Errors of the base would have filled the spectrum: where it is not full, the base holds what was edited.
    return _Spectrum(values, floors[0] if low else floors[1], right=right)


def _corner(part: Tensor) -> Tensor:
    """Evenly spread rows and columns, three times as many as a probe can tell apart."""
    rows, columns = (torch.linspace(0, size - 1, min(size, 3 * SURE)).long() for size in part.shape)
    return part[rows][:, columns]


def _probe(part: Tensor, floors: tuple[float, float]) -> _Spectrum | None:
    """The spectrum of a matrix whose rank is low but for noise below one of the floors, else `None`.

    A randomised range finder (Halko, Martinsson and Tropp 2011, algorithm 4.4 with one power step); what it leaves over
    is measured by power iteration, so nothing above the floor is missed.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(part.shape[1], PROBE, generator=generator, dtype=part.dtype)
    span = torch.linalg.qr(part @ start).Q
    span = torch.linalg.qr(part @ torch.linalg.qr(part.T @ span).Q).Q
    core = span.T @ part
    _, values, right = torch.linalg.svd(core, full_matrices=False)
    vector = torch.randn(part.shape[1], 1, generator=generator, dtype=part.dtype)
    left_over = 0.0
    for _ in range(12):
        vector = vector / torch.linalg.vector_norm(vector).clamp_min(1e-300)
        out = part @ vector - span @ (core @ vector)
        left_over = float(torch.linalg.vector_norm(out))
        vector = part.T @ out - core.T @ (span.T @ out)
    for floor in floors:
        if left_over <= floor and int((values > floor).sum()) <= SURE:
            return _Spectrum(values, floor, right=right)
    return None


def _is_cast(base: Tensor, edited: Tensor) -> bool:
    """Whether one copy is, to the bit, the other rounded to some narrower dtype (and perhaps widened again)."""
    for kind in _NARROW:
        if kind.itemsize > max(base.dtype.itemsize, edited.dtype.itemsize):
            continue
        low, high = (values.to(kind).to(torch.float32) for values in (base, edited))
        if torch.equal(low, high) and (
            torch.equal(low.to(base.dtype), base) or torch.equal(high.to(edited.dtype), edited)
        ):
            return True
    return False


def _precision(values: Tensor, kind: torch.dtype) -> torch.dtype:
    """The dtype whose steps the numbers have: a float32 file may hold what was float16 before."""
    for narrow in (torch.float16, torch.bfloat16):
        if narrow.itemsize < kind.itemsize and torch.equal(values.to(narrow).to(values.dtype), values):
            return narrow
    return kind


def _half_step(values: Tensor, kind: torch.dtype) -> Tensor:
    """Half the distance to the next number of the dtype."""
    info = torch.finfo(kind)
    values = values if values.dtype is torch.float64 else values.to(torch.float32)
    exponent = torch.frexp(values.abs().clamp_min(info.smallest_normal)).exponent
    return torch.ldexp(torch.full_like(values, info.eps / 4), exponent)


def _floor(variance: Tensor) -> float:
    """The largest singular value that errors of these variances explain."""
    return 2.0 * sum(math.sqrt(float(variance.sum(axis, dtype=torch.float64).max())) for axis in (0, 1))


def _plain(values: Tensor) -> Tensor:
    """At least one dimension; 8-bit floats, which few operations know, in float16, which holds them exactly."""
    values = values.reshape(1) if values.ndim == 0 else values
    return values.to(torch.float16) if values.dtype in _EIGHT_BITS else values


def _wider(one: Tensor, other: Tensor) -> torch.dtype:
    """A dtype that holds the numbers of both exactly."""
    if one.dtype == other.dtype:
        return one.dtype
    return torch.float64 if torch.float64 in (one.dtype, other.dtype) else torch.float32


def _as_matrix(values: Tensor) -> Tensor:
    """[first dimension, the rest]; a vector is one column, so that its entries count as rows."""
    return values.reshape(values.shape[0], -1)


def _differing_rows(change: Tensor) -> int:
    return int((_as_matrix(change) != 0).any(1).sum())


def _same_with_nan(base: Tensor, edited: Tensor) -> bool:
    values = torch.equal(torch.nan_to_num(base.double()), torch.nan_to_num(edited.double()))
    return values and torch.equal(base.isnan(), edited.isnan())


def _finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
