"""The regularised solve in a metric, for all strengths of the regularisation at once.

The metric A0 = T^T T (`linalg.metric`) prices a change D at tr(D A0 D^T). In whitened coordinates x = T^-T k the solve
is ridge regression, with a ridge of t = 1 that a factor t makes larger or smaller:

    min_D  sum_i |D k_i - r_i|^2 + sum_j |D q_j|^2 + t tr(D A0 D^T)

With all rows M = [K; Q] (weights folded in), their spread Y = M A0^-1 and the Gram matrix G = M Y^T = U diag(g) U^T,

    D(t) = R^T [(G + t I)^-1]_1..n Y                                  for N rows, of which the first n are wanted
    left undone:  E(t) = t (G + t I)^-1 [R; 0]                        wanted rows, then how far the held ones move
    price:        tr(D A0 D^T) = tr(R^T [(G + t)^-1 G (G + t)^-1]_nn R)

so that one eigendecomposition gives the whole curve of what is reached against what it costs, and the metric itself is
no longer needed: keys and their spreads are enough. With more rows than d the d x d matrix X^T X takes the place
of G (`diffedit.pairs.MANY`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffedit.linalg.gram import gram, normal_equations
from diffedit.linalg.metric import Metric

_HALVINGS = 40
_NOISE = 1e-6
FACTORS = (1e-6, 1e6)  # the range in which a factor is looked for


@dataclass(frozen=True, eq=False)
class TradeOff:
    """The solutions for all factors t at once.

    Attributes:
        wanted: |R|, the Frobenius norm of what is wanted, weights folded in.
        energies: eigenvalues g.
        undone: t -> (|E| of the wanted rows, |E| of the held rows).
        cost: t -> tr(D A0 D^T).
        solve: t -> the factors up [d_out, r], down [r, d].
        least: smallest factor that rounding allows.
    """

    wanted: float
    energies: Tensor
    undone: Callable[[float], tuple[float, float]]
    cost: Callable[[float], float]
    solve: Callable[[float], tuple[Tensor, Tensor]]
    least: float = 0.0

    def efficacy(self, t: float) -> float:
        """Share of the request that is carried out at the edited layer, 0 to 1."""
        return 1.0 - self.undone(t)[0] / self.wanted if self.wanted else 1.0

    def condition(self, t: float) -> float:
        """(g_max + t) / (g_min + t)."""
        return (max(float(self.energies[-1]), 0.0) + t) / (max(float(self.energies[0]), 0.0) + t)

    def choose(self, give_up: float) -> float:
        """The largest factor that leaves at most the share `give_up` of what can be reached undone; see `FACTORS`.

        To three digits: the search ends where both ends of what is left of the range round to the same.
        """
        low, high = max(FACTORS[0], min(self.least, 1.0)), FACTORS[1]
        least = (1.0 - give_up) * self.efficacy(low)
        for _ in range(_HALVINGS):
            if _rounded(low) == _rounded(high):
                break
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.efficacy(middle) >= least else (low, middle)
        return _rounded(low)


def _rounded(factor: float) -> float:
    return float(f"{factor:.3g}")


def from_spread(keys: Tensor, residuals: Tensor, spread: Tensor) -> TradeOff:
    """The trade-off from keys and spreads alone.

    With keys M = Q B and spreads Y the Gram matrix is G = M Y^T = Q (Q^T Y B^T) Q^T: a matrix of size min(N, d) has all
    of its eigenvalues.

    Args:
        keys: [N, d] float64, wanted rows and then held ones, weights folded in.
        residuals: [n, d_out] float64, of the wanted rows.
        spread: [N, d] float64, the keys times A0^-1, as `Metric.spread` gives it; rounded to float32, as
            pairs are kept, factors below `_NOISE` of the largest eigenvalue would amplify the rounding.
    """
    n = len(residuals)
    basis, triangle = torch.linalg.qr(keys)
    inner = basis.T @ spread
    small = inner @ triangle.T
    g, v = torch.linalg.eigh((small + small.T) / 2)
    g = g.clamp(min=0.0)
    u, reach = basis[:n] @ v, v.T @ inner
    mixed = u.T @ residuals
    energy = mixed @ mixed.T
    mine, every = (u.T @ u) * energy, energy.diagonal()
    beyond = residuals - u @ mixed  # of [R; 0] outside of all keys: nothing unless N > d
    crossed, outside = (mixed * (u.T @ beyond)).sum(1), float(beyond.square().sum())
    size = float(residuals.square().sum())
    lost = max(size - float(every.sum()), 0.0)
    energies, own, across, each = (x.cpu().numpy() for x in (g, mine, crossed, every))  # small: torch would cost more

    def undone(t: float) -> tuple[float, float]:
        left = t / (energies + t)
        asked = max(float(left @ own @ left + 2 * left @ across) + outside, 0.0)
        whole = float(each @ left**2) + lost
        return asked**0.5, max(whole - asked, 0.0) ** 0.5

    def cost(t: float) -> float:
        return float((every * g / (g + t).square()).sum())

    def solve(t: float) -> tuple[Tensor, Tensor]:
        if n <= len(g):
            return residuals.T.contiguous(), (u / (g + t)) @ reach
        return mixed.T.contiguous(), reach / (g + t)[:, None]

    least = _NOISE * float(g[-1]) if len(g) else 0.0
    return TradeOff(size**0.5, g, undone, cost, solve, least)


def from_metric(wanted: Iterable[tuple[Tensor, Tensor]], held: Iterable[Tensor], metric: Metric) -> TradeOff:
    """The same from the metric itself, for any number of rows.

    The rows come in blocks, of which one at a time is whitened and multiplied in float64; what stays is d x d.

    Args:
        wanted: at least one block of keys [b, d] and residuals [b, d_out], weights folded in; on the CPU, as all pairs.
            A block may take the memory of the one before.
        held: blocks [b, d] of the rows that are to stay, likewise.
        metric: the metric.
    """
    d = metric.root.shape[1]
    few: list[tuple[Tensor, Tensor]] = []  # the rows themselves, as long as there are fewer than d of them

    def whitened() -> Iterator[tuple[Tensor, Tensor]]:
        n = 0
        for keys, residuals in wanted:
            white, asked = metric.white(keys), residuals.double()
            yield white, asked
            n += len(white)
            if n < d:
                few.append((white, asked.clone()))
            else:
                few.clear()

    mine, crossed, size = normal_equations(whitened())
    still, anything_held = torch.zeros_like(mine), False
    for keys in held:
        still += gram(metric.white(keys))
        anything_held = True
    g, v = torch.linalg.eigh(mine + still)
    g = g.clamp(min=0.0)
    crossed = v.T @ crossed.T
    every = crossed.square().sum(1)
    own = (v.T @ mine @ v) * (crossed @ crossed.T) if anything_held else None  # else diagonal

    def undone(t: float) -> tuple[float, float]:
        gain = 1 / (g + t)
        hit = float((gain @ own @ gain) if own is not None else (every * g) @ gain.square())
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
