"""How long a piece of work takes and how much memory its tensors need, measured by doing it once.

Memory is counted from the operations themselves: every storage that an operation makes is live until the last tensor on
it is gone, and the peak of the sum is kept. Unlike the process's own size this does not depend on what the allocator
happens to hold, it is the same on every run and every system, and it sees a GPU's tensors too.

What LAPACK needs inside one operation is not seen, but known: a copy of the input and, for its divide-and-conquer
decompositions, square matrices (`gesdd` 4 n^2 numbers, `syevd` 2 n^2). Limits: Python objects are not counted, nor what
an allocator keeps of freed blocks (glibc's: measured up to 25 MB).
"""

from __future__ import annotations

import itertools
import math
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SHORT = 0.05
_EQUAL = 1e-6  # errors that differ by less are the same
_SQUARES = {"_linalg_svd": 4, "_linalg_eigh": 2, "linalg_lstsq": 4, "linalg_qr": 0, "_linalg_solve_ex": 0}


class TensorMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made inside the block.

    Args:
        apart: code whose peak, and that of what it calls, is kept apart.

    Attributes:
        peak: most bytes that were live at once.
        peak_apart: the same while the code to keep apart ran, whose bytes are then not in `peak`.
        live: bytes that are live now.
    """

    def __init__(self, apart: CodeType | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.peak_apart = self.live = 0
        self._apart = apart
        self._storages: dict[int, list[int]] = {}
        self._tensors: dict[int, weakref.ref[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note what it made."""
        out = func(*args, **(kwargs or {}))
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf, given)
        most = self.live + _workspace(func, args)
        if self._apart is not None and _runs(self._apart):
            self.peak_apart = max(self.peak_apart, most)
        else:
            self.peak = max(self.peak, most)
        return out

    def _note(self, tensor: Tensor, given: set[int]) -> None:
        key, name = _storage(tensor), id(tensor)
        if name in self._tensors or (key in given and key not in self._storages):  # the caller's own, or a view of it
            return
        if key not in self._storages:
            self._storages[key] = [0, tensor.untyped_storage().nbytes()]
            self.live += self._storages[key][1]
        self._storages[key][0] += 1

        def gone(_: weakref.ref[Tensor]) -> None:
            self._forget(key, name)

        self._tensors[name] = weakref.ref(tensor, gone)

    def _forget(self, key: int, name: int) -> None:
        self._tensors.pop(name, None)
        entry = self._storages.get(key)
        if entry is not None:
            entry[0] -= 1
            if entry[0] == 0:
                self.live -= entry[1]
                del self._storages[key]


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes of tensors that were live at once while `work` ran, on top of what was there."""
    with TensorMeter() as meter:
        work()
    return int(meter.peak)


def seconds(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes; short work is done three times, and the quickest counts."""
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
        if best > _SHORT:
            break
    return best


def extrapolate(features: Sequence[Sequence[float]], values: Sequence[float], wanted: Sequence[float]) -> float:
    """What a cost that is a sum of features, each times a constant that is not negative, is somewhere else.

    Every choice of features is fitted, fewer than there are measurements as long as there are two, so that noise does
    not pass for a law; the best fit without a negative constant counts. Errors are relative, so that the small
    measurements count as much as the large ones.

    Args:
        features: per measurement, its features (1 for a fixed cost, a size, the square of one, ...).
        values: what was measured, positive.
        wanted: the features where the cost is asked for.

    >>> round(extrapolate([(1, 1), (1, 2), (1, 4)], [3.0, 5.0, 9.0], (1, 100)), 6)
    201.0
    >>> round(extrapolate([(1, 3)], [0.6], (1, 6)), 6)
    1.2
    """
    scaled = np.array([[f / value for f in row] for row, value in zip(features, values, strict=True)])
    most = max(1, len(values) - 1)
    best, found = math.inf, math.nan
    for count in range(most, 0, -1):
        for chosen in itertools.combinations(range(len(wanted)), min(count, len(wanted))):
            part = scaled[:, chosen]
            constants, _, rank, _ = np.linalg.lstsq(part, np.ones(len(values)), rcond=None)
            if rank < len(chosen) or constants.min() < 0:
                continue
            error = float(np.abs(part @ constants - 1).max())
            cost = float(sum(constants[i] * wanted[j] for i, j in enumerate(chosen)))
            if error < best - _EQUAL or (abs(error - best) <= _EQUAL and cost > found):
                best, found = error, cost
    return found


def _workspace(func: Any, args: Sequence[Any]) -> int:
    """What LAPACK allocates for itself, one matrix of a batch after the other."""
    squares = _SQUARES.get(func.overloadpacket.__name__)
    if squares is None:
        return 0
    matrices = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.ndim > 1]
    return max((m.nbytes + squares * min(m.shape[-2:]) ** 2 * m.element_size() for m in matrices), default=0)


def _runs(code: CodeType) -> bool:
    """Whether a function is being called by this thread."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
