"""The second moment of a layer's input over everyday prompts, E[k k^T], streamed and kept as a root.

A root L ([d, d], upper triangular) with L^T L = sum k k^T is updated batch by batch through QR,

    [L; X] = Q L',        X  [n, d]

so memory stays at d^2 numbers whatever the number of prompts, and no product k k^T is ever formed: summing those
squares the condition number, and the inverse moment that rank-one editing needs would lose half its digits.

`constrained_factors` is that edit: the change of least mean squared effect on everyday inputs that meets hard demands,

    min tr(D C D^T)  subject to  D k_i = r_i,        D = R^T (K C^-1 K^T)^-1 K C^-1

with C the moment. For one key this is ROME's rank-one update. With C = L^T L and the thin QR (K L^-1)^T = Q T it is

    up = R^T  [d_out, n],        down = T^-1 (L^-1 Q)^T  [n, d_in]

Source: Meng et al. 2022 (ROME, arXiv 2202.05262), eq. 2; several keys at once as in its appendix. Limits: a moment of
fewer inputs than d has no inverse; `root(ridge)` adds `ridge` times the mean eigenvalue to every direction.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffedit.errors import IllConditionedError, NonFiniteError, RequestError

CONDITION_LIMIT = 1e14
_BLOCK = 4096


@dataclass
class SecondMoment:
    """A stream of inputs, of which only the second moment is remembered.

    Attributes:
        width: d.
        count: inputs so far.
    """

    width: int
    count: int = 0
    _root: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)

    @classmethod
    def restore(cls, root: Tensor, count: int) -> SecondMoment:
        """The moment of `count` inputs from the root [d, d] of their sum, as `total_root` gives it.

        Raises:
            RequestError: not a square matrix, or no inputs.
        """
        if root.ndim != 2 or root.shape[0] != root.shape[1] or count < 1:
            raise RequestError("a second moment is a square root and a count", value=f"{tuple(root.shape)}, {count}")
        return cls(root.shape[1], count, _finite(root.double()))

    def add(self, inputs: Tensor) -> SecondMoment:
        """Take in more inputs.

        Args:
            inputs: [n, d].

        Returns:
            The object itself.

        Raises:
            RequestError: another width.
            NonFiniteError: NaN or infinity.
        """
        if inputs.ndim != 2 or inputs.shape[1] != self.width:
            raise RequestError("the inputs have another width", value=f"{tuple(inputs.shape)}, expected {self.width}")
        for block in torch.split(_finite(inputs.detach().double()), _BLOCK):
            known = self._root if self._root.ndim == 2 else block[:0]
            self._root = torch.linalg.qr(torch.cat([known.to(block.device), block])).R
        self.count += len(inputs)
        return self

    @property
    def total_root(self) -> Tensor:
        """[d, d] float64, upper triangular: root^T root is the sum over all inputs."""
        if not self.count:
            raise RequestError("a second moment needs inputs", value="0 inputs")
        missing = self.width - len(self._root)
        return torch.cat([self._root, self._root.new_zeros(missing, self.width)]) if missing else self._root

    def root(self, ridge: float = 0.0) -> Tensor:
        """[d, d] float64, upper triangular: root^T root = C + ridge tr(C) / d I, with C the mean over the inputs.

        Args:
            ridge: share of the mean eigenvalue that is added to all; larger keeps edits out of unused directions.
        """
        mean: Tensor = self.total_root / self.count**0.5
        if ridge == 0.0:
            return mean
        level = ridge * float(mean.square().sum()) / self.width
        raised: Tensor = torch.linalg.qr(torch.cat([mean, level**0.5 * torch.eye(self.width).to(mean)])).R
        return raised


@dataclass(frozen=True)
class ConstrainedSolution:
    """Factors of a change that meets hard demands.

    Attributes:
        up: [d_out, n], float64.
        down: [n, d_in], float64.
        condition: condition number of the demands in the metric of the moment, K C^-1 K^T.
    """

    up: Tensor
    down: Tensor
    condition: float


def constrained_factors(keys: Tensor, residuals: Tensor, root: Tensor) -> ConstrainedSolution:
    """The change D with D k_i = r_i that moves everyday inputs least.

    Args:
        keys: [n, d_in].
        residuals: [n, d_out], wanted minus present output.
        root: [d_in, d_in], upper triangular root of the second moment.

    Raises:
        RequestError: shapes disagree, or there are no keys.
        NonFiniteError: an input holds NaN or infinity.
        IllConditionedError: the moment has no inverse, or the keys depend on each other.
    """
    keys, residuals, root = (_finite(value.detach().double()) for value in (keys, residuals, root))
    n, d = keys.shape
    if n == 0 or len(residuals) != n or root.shape != (d, d):
        shapes = [tuple(value.shape) for value in (keys, residuals, root)]
        raise RequestError("keys, residuals and moment do not fit", value=shapes)
    scale = root.diagonal().abs()
    if not bool((scale > torch.finfo(torch.float64).eps * d * scale.max()).all()):
        raise IllConditionedError(
            "the second moment has no inverse", value=f"{d} features", hint="use more prompts, or a ridge"
        )
    with torch.autocast(device_type=keys.device.type, enabled=False), torch.no_grad():
        white = torch.linalg.solve_triangular(root.T, keys.T, upper=False)
        basis, mix = torch.linalg.qr(white)
        sigma = torch.linalg.svdvals(mix)
        condition = float((sigma[0] / sigma[-1]) ** 2) if float(sigma[-1]) > 0 else float("inf")
        if n > d or not condition <= CONDITION_LIMIT:
            raise IllConditionedError(
                "the demands depend on each other",
                value=f"{n} keys, condition {condition:.1e}, limit {CONDITION_LIMIT:.0e}",
                hint="remove subjects that mean the same",
            )
        spread = torch.linalg.solve_triangular(root, basis, upper=True)
        down = torch.linalg.solve_triangular(mix, spread.T, upper=True)
    return ConstrainedSolution(residuals.T.contiguous(), down, condition)


def _finite(value: Tensor) -> Tensor:
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise NonFiniteError("inputs of the second moment are not finite", value=f"{bad} of {value.numel()} numbers")
    return value
