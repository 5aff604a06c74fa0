"""A metric for changes of a weight, and the regularised solve in it.

Plain ridge regression charges a change `D` for its size, lam |D|^2. Charging it for what it does to everyday inputs,
whose second moment is C, is the better price:

    tr(D A0 D^T),    A0 = lam I + mu C = T^T T,    T  [d, d] upper triangular.

In whitened coordinates x = T^-T k this is ridge regression again, with a ridge of t = 1 that a factor t makes larger
or smaller:

    min_D  sum_i |D k_i - r_i|^2 + sum_j |D q_j|^2 + t tr(D A0 D^T)

With all rows M = [K; Q] (weights folded in), their spread Y = M A0^-1 and the Gram matrix G = M Y^T = U diag(g) U^T,

    D(t) = R^T [(G + t I)^-1]_1..n Y                                  for N rows, of which the first n are wanted
    left undone:  E(t) = t (G + t I)^-1 [R; 0]                        wanted rows, then how far the held ones move
    price:        tr(D A0 D^T) = tr(R^T [(G + t)^-1 G (G + t)^-1]_nn R)

so that one eigendecomposition gives the whole curve of what is reached against what it costs, and the metric itself is
no longer needed: keys and their spreads are enough. With many more rows than d the d x d matrix X^T X takes the place
of G (`diffedit.pairs.MANY`).

Demands that nothing may cost, D z = 0, go into the metric as well: the part of each whitened key that lies in the span
of the whitened z is taken out. `exclude` does that; then D z = 0 up to rounding, whatever else is asked for.

Source: the everyday moment is that of MEMIT (Meng et al. 2023, arXiv 2210.07229), the exclusion the null-space
constraint of AlphaEdit (Fang et al. 2025, arXiv 2410.02355) and SPEED (arXiv 2503.07392), here exact and in the metric.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from diffedit.errors import IllConditionedError, NonFiniteError, RequestError
from diffedit.linalg.gram import gram

_RANK_TOL = 1e-10
_ROOM = 1e-6
_GRAM_LIMIT = 1e9  # condition up to which forming A0 loses nothing that float32 factors could show
_HALVINGS = 40
FACTORS = (1e-6, 1e6)  # the range in which a factor is looked for


@dataclass(frozen=True, eq=False)
class Metric:
    """The price of a change; see the module's text.

    Attributes:
        root: [d, d] float64, upper triangular T.
        excluded: [z, d] float64, orthonormal rows in whitened coordinates that no change may touch.
    """

    root: Tensor
    excluded: Tensor

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
        return cls(torch.linalg.qr(rows, mode="r").R, rows.new_zeros(0, width))

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
                return cls(lower.T.contiguous(), rows.new_zeros(0, rows.shape[1]))
        return cls.build(lam, rows, rows.shape[1])

    def exclude(self, rows: Tensor) -> Metric:
        """The metric in which no change may touch these inputs [z, d]."""
        _, sigma, right = torch.linalg.svd(self._whiten(rows), full_matrices=False)
        basis = right[sigma > _RANK_TOL * sigma[0]] if len(sigma) and float(sigma[0]) > 0 else right[:0]
        return replace(self, excluded=basis)

    def white(self, rows: Tensor) -> Tensor:
        """[n, d] float64: rows in whitened coordinates, without what is excluded."""
        found = self._whiten(rows)
        return found - (found @ self.excluded.T) @ self.excluded if len(self.excluded) else found

    def check_room(self, blocks: Iterable[Tensor]) -> None:
        """Raise `IllConditionedError` if nothing of these rows [b, d] is left outside what is excluded."""
        if not len(self.excluded):
            return
        left = whole = 0.0
        for rows in blocks:
            white = self._whiten(rows)
            whole += float(white.square().sum())
            left += float((white - (white @ self.excluded.T) @ self.excluded).square().sum())
        if left <= _ROOM**2 * whole:
            raise IllConditionedError(
                "nothing of the edit is left",
                value=f"{len(self.excluded)} of {self.root.shape[1]} dimensions must not change",
                cause="the subject's keys lie in the span of the inputs that must not change at all",
                hint="preserve fewer names, or hold them softly with exact='none'",
            )

    def back(self, white: Tensor) -> Tensor:
        """[n, d]: whitened rows x as the rows x T^-T that multiply keys; of `white(k)` it is the spread of k."""
        found: Tensor = torch.linalg.solve_triangular(self.root.to(white.device).T, white, upper=False, left=False)
        return found

    def rounded(self) -> Metric:
        """The same to float32, as it is stored."""
        return Metric(self.root.float().double(), self.excluded.float().double())

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits of its content, in float32: a change of rounding is no other metric."""
        found = hashlib.sha256()
        for part in (self.root, self.excluded.T @ self.excluded):
            found.update(part.detach().cpu().float().contiguous().numpy().data)
        return found.hexdigest()[:16]

    def _whiten(self, rows: Tensor) -> Tensor:
        root = self.root.to(rows.device)
        found: Tensor = torch.linalg.solve_triangular(root, rows.double(), upper=True, left=False)
        return found


@dataclass(frozen=True, eq=False)
class TradeOff:
    """The solutions for all factors t at once.

    Attributes:
        wanted: |R|, the Frobenius norm of what is wanted, weights folded in.
        energies: eigenvalues g.
        undone: t -> (|E| of the wanted rows, |E| of the held rows).
        cost: t -> tr(D A0 D^T).
        solve: t -> the factors up [d_out, r], down [r, d].
    """

    wanted: float
    energies: Tensor
    undone: Callable[[float], tuple[float, float]]
    cost: Callable[[float], float]
    solve: Callable[[float], tuple[Tensor, Tensor]]

    def efficacy(self, t: float) -> float:
        """Share of the request that is carried out at the edited layer, 0 to 1."""
        return 1.0 - self.undone(t)[0] / self.wanted if self.wanted else 1.0

    def condition(self, t: float) -> float:
        """(g_max + t) / (g_min + t)."""
        return (max(float(self.energies[-1]), 0.0) + t) / (max(float(self.energies[0]), 0.0) + t)

    def choose(self, give_up: float) -> float:
        """The largest factor that leaves at most the share `give_up` of what can be reached undone; see `FACTORS`."""
        low, high = FACTORS
        least = (1.0 - give_up) * self.efficacy(low)
        for _ in range(_HALVINGS):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.efficacy(middle) >= least else (low, middle)
        return float(f"{low:.3g}")


def from_spread(keys: Tensor, residuals: Tensor, spread: Tensor) -> TradeOff:
    """The trade-off from keys and spreads alone: for fewer rows than a key has numbers.

    Args:
        keys: [N, d] float64, wanted rows and then held ones, weights folded in.
        residuals: [n, d_out] float64, of the wanted rows.
        spread: [N, d] float64, the keys times A0^-1, as `Metric.back(Metric.white(keys))` gives it.

    """
    n = len(residuals)
    gram = keys @ spread.T
    g, u = torch.linalg.eigh((gram + gram.T) / 2)
    g = g.clamp(min=0.0)
    mixed = u[:n].T @ residuals
    energy = mixed @ mixed.T
    mine, every = (u[:n].T @ u[:n]) * energy, energy.diagonal()

    def undone(t: float) -> tuple[float, float]:
        left = t / (g + t)
        asked = max(float(left @ mine @ left), 0.0)
        return asked**0.5, max(float(every @ left.square()) - asked, 0.0) ** 0.5

    def cost(t: float) -> float:
        return float((every * g / (g + t).square()).sum())

    def solve(t: float) -> tuple[Tensor, Tensor]:
        return residuals.T.contiguous(), ((u[:n] / (g + t)) @ u.T) @ spread

    return TradeOff(float(torch.linalg.vector_norm(residuals)), g, undone, cost, solve)


def from_metric(wanted: Iterable[tuple[Tensor, Tensor]], held: Iterable[Tensor], metric: Metric) -> TradeOff:
    """The same from the metric itself: for at least as many rows as a key has numbers.

    The rows come in blocks, of which one at a time is whitened and multiplied in float64; what stays is d x d.

    Args:
        wanted: at least one block of keys [b, d] and residuals [b, d_out], weights folded in.
        held: blocks [b, d] of the rows that are to stay.
        metric: the metric.
    """
    d = metric.root.shape[1]
    mine, still = metric.root.new_zeros(2, d, d)
    crossed, size, n = metric.root.new_zeros(d, 1), 0.0, 0
    few: list[tuple[Tensor, Tensor]] = []  # the rows themselves, as long as there are fewer than d of them
    for keys, residuals in wanted:
        white, asked = metric.white(keys), residuals.double()
        mine = mine.to(white.device) + gram(white)
        crossed = crossed.to(white.device) + white.T @ asked
        size += float(asked.square().sum())
        n += len(white)
        few = [*few, (white, asked)] if n < d else []
    for keys in held:
        still = still.to(keys.device) + gram(metric.white(keys))
    g, v = torch.linalg.eigh(mine + still.to(mine.device))
    g = g.clamp(min=0.0)
    crossed = v.T @ crossed
    energy = crossed @ crossed.T
    own, every = (v.T @ mine @ v) * energy, energy.diagonal()

    def undone(t: float) -> tuple[float, float]:
        gain = 1 / (g + t)
        hit = float(gain @ own @ gain)
        left = size - 2 * float(every @ gain) + hit
        return max(left, 0.0) ** 0.5, max(float((every * g) @ gain.square()) - hit, 0.0) ** 0.5

    def cost(t: float) -> float:
        return float((every / (g + t).square()).sum())

    def solve(t: float) -> tuple[Tensor, Tensor]:
        if few:
            white, asked = (torch.cat(parts) for parts in zip(*few, strict=True))
            return asked.T.contiguous(), metric.back(((white @ v) / (g + t)) @ v.T)
        return metric.back((crossed / (g + t)[:, None]).T @ v.T), torch.eye(d, dtype=g.dtype, device=g.device)

    return TradeOff(size**0.5, g, undone, cost, solve)


def _check_lam(lam: float) -> None:
    if not 0 < lam < float("inf"):
        raise RequestError("a metric needs a positive, finite lam", value=lam)
