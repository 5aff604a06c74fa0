"""What a change makes of a weight: the rounded sum, what the rounding kept of it, and which bits result.

    W' = cast(W + D),    achieved = <D, W' - W> / <D, D>

The sum runs in float64 whatever the weight's dtype; rounding errors outside the rows that D acts on do not count in the
share, for D projects them away. In float32 the share is 1 to six digits; float16 and bfloat16 lose what is smaller than
their rounding step, and an edit that they swallow is refused rather than written.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from diffedit.delta import LowRank
from diffedit.errors import NonFiniteError, NoOpError, SwallowedError
from diffedit.site import EditSite

FLOORS = {torch.float64: 0.99, torch.float32: 0.99, torch.float16: 0.95, torch.bfloat16: 0.90}

_BLOCK = 1 << 15  # numbers; a few blocks of float64 fit the processor's own cache


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of the numbers, row-major, in the tensor's own dtype."""
    data = tensor.detach().cpu().contiguous()
    return hashlib.sha256(data.view(torch.uint8).numpy().data).hexdigest()


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
    """Frobenius norm of a matrix, squared and summed in float64 whatever its dtype; NaN and infinity carry over."""
    parts, total = torch.split(weight.detach(), _rows(weight)), 0.0
    for part, wide in zip(parts, _buffers(parts, 1), strict=True):
        flat = wide[0].copy_(part).view(-1)
        total += float(torch.dot(flat, flat))
    return math.sqrt(total)


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


def rounded_sum(site: EditSite, base: Tensor, changes: list[LowRank]) -> tuple[Tensor, tuple[float, float]]:
    """cast(base + D), D the sum of the changes, and beside it (<D, D>, <D, what the cast made of it - base>).

    One pass over blocks that fit the processor's cache. NaN and infinity anywhere in base or result end in the second
    product.
    """
    for change in changes:
        change.check_finite(site.name)
    up = torch.cat([change.up.double().to(base.device) for change in changes], 1)
    down = torch.cat([change.down.double().to(base.device) for change in changes], 0)
    weight = torch.empty_like(base)
    blocks = [torch.split(x, _rows(base)) for x in (base, up, weight)]
    asked = got = 0.0
    for before, factor, after, (exact, wanted, made) in zip(*blocks, _buffers(blocks[0], 3), strict=True):
        exact.copy_(before)
        torch.mm(factor, down, out=wanted)
        after.copy_(torch.add(exact, wanted, out=made))
        made.copy_(after).sub_(exact)
        asked += float(torch.dot(wanted.view(-1), wanted.view(-1)))
        got += float(torch.dot(wanted.view(-1), made.view(-1)))
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
    return weight, (asked, got)


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


def _buffers(parts: Sequence[Tensor], count: int) -> Iterator[Tensor]:
    """Per part [n, d] the same float64 memory [count, n, d]: fresh memory would cost more than what is done in it."""
    memory = parts[0].new_empty(count, *parts[0].shape, dtype=torch.float64)
    return (memory[:, : len(part)] for part in parts)


def _rows(matrix: Tensor) -> int:
    return max(1, _BLOCK // max(1, matrix.shape[1]))
