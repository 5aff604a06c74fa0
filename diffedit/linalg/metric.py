"""A metric for changes of a weight.

Plain ridge regression charges a change `D` for its size, lam |D|^2. Charging it for what it does to everyday inputs,
whose second moment is C, is the better price:

    tr(D A0 D^T),    A0 = lam I + mu C = T^T T,    T  [d, d] upper triangular.

The solve in it is `linalg.curve`'s.

Demands that nothing may cost, D z = 0, go into the metric as well: the part of each whitened key that lies in the span
of the whitened z is taken out. `exclude` does that; then D z = 0 up to rounding, whatever else is asked for.

Source: the everyday moment is that of MEMIT (Meng et al. 2023, arXiv 2210.07229), the exclusion the null-space
constraint of AlphaEdit (Fang et al. 2025, arXiv 2410.02355) and SPEED (arXiv 2503.07392), here exact and in the metric.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from diffedit.errors import IllConditionedError, NonFiniteError, RequestError

_RANK_TOL = 1e-10
_ROOM = 1e-6
_GRAM_LIMIT = 1e9  # condition up to which forming A0 loses nothing that float32 factors could show
_PROBES = (0.7, 1.1, 1.9)
_SAME = 1e-3


@dataclass(frozen=True, eq=False)
class Metric:
    """The price of a change, kept on the CPU; see the module's text.

    Attributes:
        root: [d, d] float64, upper triangular T.
        excluded: [z, d] float64, orthonormal rows in whitened coordinates that no change may touch.
        inverse: [d, d] float64, A0^-1 where nothing is excluded, for a metric that is used again and again.
    """

    root: Tensor
    excluded: Tensor
    inverse: Tensor | None = None

    @classmethod
    def build(cls, lam: float, moment_root: Tensor | None, width: int) -> Metric:
        """The metric lam I + moment_root^T moment_root.

        Args:
            lam: positive.
            moment_root: [r, d], any root of mu C; `None` for none.
            width: d.

        Raises:
            RequestError: lam is not positive, or another width.
            NonFiniteError: NaN or infinity.
        """
        _check_lam(lam)
        identity = torch.eye(width, dtype=torch.float64)
        if moment_root is None:
            return cls(lam**0.5 * identity, identity.new_zeros(0, width))
        if moment_root.ndim != 2 or moment_root.shape[1] != width:
            raise RequestError("the second moment has another width", value=f"{tuple(moment_root.shape)}, not {width}")
        if not bool(torch.isfinite(moment_root).all()):
            raise NonFiniteError("the second moment is not finite", value=tuple(moment_root.shape))
        rows = torch.cat([moment_root.double(), lam**0.5 * identity.to(moment_root.device)])
        return cls(torch.linalg.qr(rows, mode="r").R.cpu(), identity.new_zeros(0, width))

    @classmethod
    def of_inputs(cls, lam: float, weight: float, inputs: Iterable[Tensor]) -> Metric:
        """The metric lam I + weight C, with C the mean of k k^T over all inputs.

        Args:
            lam: positive.
            weight: mu, positive.
            inputs: parts [n, d], at least one row in all.

        Raises:
            RequestError: lam is not positive, or there are no inputs.
            NonFiniteError: NaN or infinity.
        """
        _check_lam(lam)
        parts = [part.detach().double() for part in inputs]
        if not sum(map(len, parts)):
            raise RequestError("a second moment needs inputs", value="0 inputs")
        rows = torch.cat(parts) * (weight / sum(map(len, parts))) ** 0.5
        if not bool(torch.isfinite(rows.sum())):
            raise NonFiniteError("the inputs are not finite", value=tuple(rows.shape))
        price = rows.T @ rows
        price.diagonal().add_(lam)
        if float(price.diagonal().sum()) <= _GRAM_LIMIT * lam:
            lower, info = torch.linalg.cholesky_ex(price)
            if not int(info):
                return cls(lower.T.contiguous().cpu(), torch.zeros(0, rows.shape[1], dtype=torch.float64))
        return cls.build(lam, rows, rows.shape[1])

    def exclude(self, rows: Tensor) -> Metric:
        """The metric in which no change may touch these inputs [z, d]."""
        _, sigma, right = torch.linalg.svd(self._whiten(rows), full_matrices=False)
        basis = right[sigma > _RANK_TOL * sigma[0]] if len(sigma) and float(sigma[0]) > 0 else right[:0]
        return replace(self, excluded=basis.cpu(), inverse=None)

    def kept(self) -> Metric:
        """The same with the inverse: worth its d^3 for a metric of many edits."""
        if len(self.excluded):
            return self
        root = torch.linalg.solve_triangular(self.root, torch.eye(len(self.root), dtype=self.root.dtype), upper=True)
        return replace(self, inverse=root @ root.T)

    def spread(self, rows: Tensor) -> Tensor:
        """[n, d] float64: rows times A0^-1, without what is excluded."""
        if self.inverse is None:
            return self.back(self.white(rows))
        return (self.inverse.to(rows.device) @ rows.double().T).T  # symmetric, and so it is read as it lies in memory

    def white(self, rows: Tensor) -> Tensor:
        """[n, d] float64: rows in whitened coordinates, without what is excluded."""
        return self._outside(self._whiten(rows))

    def check_room(self, blocks: Iterable[Tensor]) -> None:
        """Raise `IllConditionedError` if nothing of these rows [b, d] is left outside what is excluded."""
        if not len(self.excluded):
            return
        left = whole = 0.0
        for rows in blocks:
            white = self._whiten(rows)
            whole += float(white.square().sum())
            left += float(self._outside(white).square().sum())
        if left <= _ROOM**2 * whole:
            raise IllConditionedError(
                "nothing of the edit is left",
                value=f"{len(self.excluded)} of {self.root.shape[1]} dimensions must not change",
                cause="the subject's keys lie in the span of the inputs that must not change at all",
                hint="preserve fewer names, or hold them softly with exact='none'",
            )

    def back(self, white: Tensor) -> Tensor:
        """[n, d]: whitened rows x as the rows x T^-T that multiply keys."""
        found: Tensor = torch.linalg.solve_triangular(self.root.to(white.device), white.T, upper=True)
        return found.T  # from the left, for that is faster

    def rounded(self) -> Metric:
        """The same to float32, as it is stored."""
        return Metric(self.root.float().double(), self.excluded.float().double())

    @cached_property
    def marks(self) -> tuple[float, ...]:
        """What fixed probe vectors p cost, p A0 p, and how far they reach, |white(p)|^2.

        Two metrics of the same model, captions and settings have the same marks up to rounding, whatever processor they
        were measured on (`same_marks`).
        """
        d = self.root.shape[1]
        place = torch.arange(1, d + 1, dtype=torch.float64)
        probes = torch.stack([torch.cos(step * place) for step in _PROBES])
        costs, reaches = (probes @ self.root.T).square().sum(1), self.white(probes).square().sum(1)
        return tuple(float(f"{value:.6g}") for value in (*costs.tolist(), *reaches.tolist()))

    def _whiten(self, rows: Tensor) -> Tensor:
        root = self.root.to(rows.device)
        found = rows.to(torch.float64, copy=True)
        torch.linalg.solve_triangular(root.T, found.T, upper=False, out=found.T)
        return found

    def _outside(self, white: Tensor) -> Tensor:
        """Whitened rows without what is excluded."""
        excluded = self.excluded.to(white.device)
        return white - (white @ excluded.T) @ excluded if len(excluded) else white


def same_marks(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two metrics are the same up to the rounding of the model's arithmetic; `Metric.marks`."""
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(abs(a - b) <= _SAME * max(abs(a), abs(b)) for a, b in pairs)


def _check_lam(lam: float) -> None:
    if not 0 < lam < float("inf"):
        raise RequestError("a metric needs a positive, finite lam", value=lam)
