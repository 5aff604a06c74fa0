"""What a change makes of a weight: the rounded sum, what the rounding kept of it, and which bits result.

    W' = cast(W + D),    achieved = <D, W' - W> / <D, D>

The sum runs in float64 whatever the weight's dtype; rounding errors outside the rows that D acts on do not count in the
share, for D projects them away. In float32 the share is 1 to six digits; float16 and bfloat16 lose what is smaller than
their rounding step, and an edit that they swallow is refused rather than written.
"""

from __future__ import annotations

import hashlib
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from diffedit.delta import LowRank
from diffedit.errors import NonFiniteError, NoOpError, SwallowedError
from diffedit.site import EditSite

FLOORS = {torch.float64: 0.99, torch.float32: 0.99, torch.float16: 0.95, torch.bfloat16: 0.90}

_BLOCK = 1 << 15  # numbers; a few blocks of float64 fit the processor's own cache
_LARGE, _PIECE = 1 << 20, 1 << 18  # bytes from which a thread of its own hashes, and how many at a time
_SAFE = 1e-15, 1e15  # norms whose square a float32 sum holds


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of the numbers, row-major, in the tensor's own dtype."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


@cache
def _beside() -> ThreadPoolExecutor:
    """One thread that hashes while others work; hashlib lets go of the interpreter."""
    return ThreadPoolExecutor(1, "diffedit-sha256")


if hasattr(os, "register_at_fork"):  # a thread does not survive a fork
    os.register_at_fork(after_in_child=_beside.cache_clear)


class Hashing:
    """SHA-256 of a tensor that is still being filled, row by row: a large one's in a thread beside that work.

    Args:
        tensor: contiguous, at least one dimension.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._digest = hashlib.sha256()
        self._data = _bytes(tensor) if tensor.device.type == "cpu" and tensor.nbytes >= _LARGE else None
        self._start = 0
        self._last: Future[None] | None = None

    def filled(self, rows: int) -> None:
        """Nobody writes to the first `rows` rows any more."""
        if self._data is None:
            return
        end = rows * self._tensor[0].nbytes
        if end - self._start < _PIECE and end < len(self._data):  # to wake the other thread costs more than a block
            return
        try:
            self._last = _beside().submit(self._digest.update, self._data[self._start : end])
            self._start = end
        except RuntimeError:  # the interpreter is about to end
            self._data = None

    @cached_property
    def sha256(self) -> str:
        """Of all rows, once they are filled; waits for the thread."""
        if self._data is None or self._last is None:
            return tensor_hash(self._tensor)
        self._last.result()
        return self._digest.hexdigest()


def cast_hashes(weight: Tensor) -> dict[str, str]:
    """Hashes of a weight in its own dtype and in each narrower one, by dtype name.

    They let a half-precision copy of the same base be recognised.
    """
    own = weight.dtype
    dtypes = [own, *(d for d in (torch.float32, torch.float16, torch.bfloat16) if d.itemsize < own.itemsize)]
    return {dtype_name(dtype): tensor_hash(weight.detach().to(dtype)) for dtype in dtypes}


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name in files and messages, such as "float16"."""
    return str(dtype).removeprefix("torch.")


def same_bits(live: Tensor, kept: Tensor) -> bool:
    """Whether two tensors hold the same bits; `False` also where that cannot be told cheaply."""
    if live.dtype != kept.dtype or live.device != kept.device or not (live.is_contiguous() and kept.is_contiguous()):
        return False
    flat = live.detach().view(-1), kept.view(-1)  # as integers: -0 is not 0, NaN is itself
    width = torch.int64 if flat[0].numel() * flat[0].element_size() % 8 == 0 else torch.uint8
    try:
        one, other = flat[0].view(width), flat[1].view(width)
    except RuntimeError:  # memory that does not start at a multiple of eight bytes
        return False
    if one.device.type != "cpu":
        return torch.equal(one, other)
    return np.array_equal(one.numpy(), other.numpy())  # NumPy's comparison takes a third of the time of torch's


def frobenius(weight: Tensor) -> float:
    """Frobenius norm of a matrix: each row's in float32 (float64 for float64), to some seven digits, summed in float64.

    NaN and infinity carry over. What float32 cannot square takes the slower way, all in float64.
    """
    weight = weight.detach()
    exact = torch.promote_types(weight.dtype, torch.float32)
    norm = math.sqrt(float(torch.linalg.vector_norm(weight, dim=1, dtype=exact).double().square().sum()))
    if exact is torch.float64 or _SAFE[0] < norm < _SAFE[1]:
        return norm
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64))


class Known:
    """What is computed of one tensor at most once; for a copy that nobody writes to.

    Args:
        weight: [d_out, d_in].
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @cached_property
    def hashes(self) -> dict[str, str]:
        """`cast_hashes`; not to be changed by the caller."""
        return cast_hashes(self.weight)

    @cached_property
    def norm(self) -> float:
        """`frobenius`."""
        return frobenius(self.weight)


@dataclass(frozen=True, eq=False)
class Rounded:
    """What a change D makes of a weight W.

    Attributes:
        weight: [d_out, d_in], cast(W + D).
        got: <D, weight - W>, to six digits; to float64's for a float64 weight.
        hashing: of the weight.
    """

    weight: Tensor
    got: float
    hashing: Hashing


def rounded_sum(site: EditSite, base: Tensor, changes: list[LowRank]) -> Rounded:
    """The base with the sum of the changes, and what the cast made of it.

    One pass over blocks that fit the processor's cache. With D = U V, <D, E> is <U, E V^T>: small factors, and NaN and
    infinity anywhere in base or result end in it.

    Raises:
        NonFiniteError: a change, the base or the result is not finite.
    """
    for change in changes:
        change.check_finite(site.name)
    up = torch.cat([change.up.double().to(base.device) for change in changes], 1)
    down = torch.cat([change.down.double().to(base.device) for change in changes], 0)
    weight = torch.empty_like(base, memory_format=torch.contiguous_format)
    exact = torch.promote_types(base.dtype, torch.float32)
    seen = up.new_empty(up.shape, dtype=exact)  # (W' - W) V^T
    narrow, size = down.T.to(exact), _rows(base)
    blocks = zip(*(torch.split(x, size) for x in (base, up, weight, seen)), strict=True)
    # One memory for all blocks: fresh memory would cost more than the sums.
    total, made = (base.new_empty(size, base.shape[1], dtype=dtype) for dtype in (torch.float64, exact))
    hashing, done = Hashing(weight), 0
    for before, factor, after, part in blocks:
        n = len(after)
        after.copy_(total[:n].copy_(before).addmm_(factor, down))
        done += n
        hashing.filled(done)
        torch.mm(made[:n].copy_(after).sub_(before), narrow, out=part)
    got = float((up * seen).sum())
    if got - got != 0.0:  # infinite or NaN
        bad = int((~torch.isfinite(base)).sum())
        if bad:
            raise NonFiniteError(
                f"the weight of {site.name} is not finite", value=f"{bad} numbers", hint="reload the model"
            )
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(
                f"the edited weight of {site.name} overflows {base.dtype}", hint="load the model in float32"
            )
    return Rounded(weight, got, hashing)


def achieved_share(site: EditSite, dtype: torch.dtype, asked: float, got: float) -> float:
    """The share of one edit's change that the cast kept; refuses what does next to nothing.

    Args:
        site: for the message.
        dtype: the weight's.
        asked: <D, D> of the change D.
        got: <D, E> of D and what the weight really changed by. Rounding errors outside the change's row space do not
            count in it, for D projects them away.
    """
    if asked == 0.0:
        raise NoOpError(f"the edit does not change {site.name}", hint="choose another target, or do not scale it to 0")
    achieved = got / asked
    floor = FLOORS.get(dtype, 0.99)
    if achieved < floor:
        raise SwallowedError(
            f"{dtype} keeps too little of the change at {site.name}",
            value=f"{achieved:.1%} of it, at least {floor:.0%} is needed",
            cause="the change is smaller than the dtype's rounding step",
            hint="load the model in float32 and edit that",
        )
    return achieved


def _rows(matrix: Tensor) -> int:
    return max(1, _BLOCK // max(1, matrix.shape[1]))
