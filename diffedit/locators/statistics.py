"""Means of repeated runs with bootstrap intervals that respect how the runs hang together.

Runs of one prompt with several seeds are not independent, so the bootstrap has two stages: prompts are drawn with
replacement, then seeds within each drawn prompt, and every prompt weighs the same (Davison & Hinkley 1997, section
3.8). One prompt alone leaves the second stage; a single run has no interval at all, which is given as infinite.
Percentile intervals; the draws come from a generator of their own, so the same runs always give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval.

    Attributes:
        mean: over prompts, each weighing the same.
        low: lower end; minus infinity if a single run gives none.
        high: upper end.
        n: runs behind it.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def positive(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


class Bootstrap:
    """The same resampled weights for everything measured in the same runs.

    Args:
        groups: per run, what it shares with others (its prompt); equal values are one group.
        resamples: number of resamples.
        seed: of the draws.
    """

    def __init__(self, groups: Sequence[Hashable], resamples: int = RESAMPLES, seed: int = 0) -> None:
        self._n = len(groups)
        names = list(dict.fromkeys(groups))
        members = [[i for i, group in enumerate(groups) if group == name] for name in names]
        rng = np.random.default_rng(seed)
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
        self._weights: Array = np.zeros((resamples, self._n))
        self._plain: Array = np.zeros((1, self._n))
        for column, runs in zip(times.T, members, strict=True):
            size = len(runs)
            self._weights[:, runs] = rng.multinomial(column * size, np.full(size, 1 / size)) / size
            self._plain[:, runs] = 1 / size

    def estimate(self, values: Array) -> Estimate:
        """Of one number per run [n]; runs where it is missing are NaN."""
        mean, low, high, n = self.estimates(np.asarray(values, dtype=np.float64)[:, None])
        return Estimate(float(mean[0]), float(low[0]), float(high[0]), int(n[0]))

    def estimates(self, values: Array) -> tuple[Array, Array, Array, NDArray[np.int64]]:
        """Of many numbers per run [n, m]: means, lower ends, upper ends and runs behind each, [m]."""
        there = ~np.isnan(values)
        filled = np.where(there, values, 0.0)
        n = there.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = ((self._plain @ filled) / (self._plain @ there))[0]
            draws = (self._weights @ filled) / (self._weights @ there)
        low, high = np.full(len(n), -math.inf), np.full(len(n), math.inf)
        for column in np.flatnonzero(n > 1):
            seen = draws[:, column][~np.isnan(draws[:, column])]
            low[column], high[column] = np.quantile(seen, (0.025, 0.975))
        return mean, low, high, n
