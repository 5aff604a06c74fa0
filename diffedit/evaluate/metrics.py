"""The arithmetic of an evaluation: shares, distances and their intervals. No model and no picture is known here.

    Rate       k of n, Clopper-Pearson 95% interval (exact; Clopper & Pearson 1934, Biometrika 26)
    CLIP-MMD   1000 * mean over i != j of  k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j)
               k(a, b) = exp(-|a - b|^2 / (2 * 10^2)),  x_i, y_i: unit CLIP vectors [n, d] of pair i before and after
    kept       mean max(cos_after, 0) / mean max(cos_before, 0), a ratio of CLIPScores

Kernel, width and factor are those of CMMD (Jayasumana et al. 2024, arXiv 2401.09603). We differ in the estimator: the
pictures are paired by seed, so it is the unbiased U-statistic over pairs (Gretton et al. 2012, JMLR 13, equation 3),
which is 0 (to rounding) when no picture changed and may fall a little below 0 by chance. CLIPScore: Hessel et al. 2021,
arXiv 2104.08718, whose constant cancels. Intervals of the last two are percentile bootstrap intervals over pairs with a
fixed seed; a resampled pair never meets its own copy, which would bias the U-statistic upwards.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diffedit.errors import UnsupportedModelError
from diffedit.evaluate.records import Rate

Array = NDArray[np.float64]
Interval = tuple[float, float]
RESAMPLES = 2000
WIDTH, SCALE = 10.0, 1000.0


def need(*packages: str) -> None:
    """Raise `UnsupportedModelError` if a package of the `eval` extra is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedModelError(
            "evaluations need packages that are not installed",
            value=", ".join(missing),
            hint="install them with: python -m pip install 'diffedit[eval]'",
        )


def rate(hits: int, n: int) -> Rate:
    """`hits` of `n` with its exact 95% interval.

    >>> print(rate(0, 300))
    0 of 300 (0.00 to 0.01)
    """
    if n == 0:
        return Rate(hits=0, n=0, share=None, low=0.0, high=1.0)
    from scipy.stats import binomtest

    found = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="exact")
    return Rate(hits=hits, n=n, share=hits / n, low=float(found.low), high=float(found.high))


def complement(of: Rate) -> Rate:
    """The rate of the opposite: its hits are the misses."""
    return rate(of.n - of.hits, of.n)


def paired_mmd(before: Array, after: Array, resamples: int = RESAMPLES) -> tuple[float, Interval]:
    """CLIP-MMD between pictures before and after, and its interval; see the module's text.

    Args:
        before: [n, d] unit vectors, n >= 2.
        after: [n, d], of the same prompts and seeds.
        resamples: of the bootstrap.
    """
    n = len(before)
    cross = _kernel(before, after)
    terms = _kernel(before, before) + _kernel(after, after) - cross - cross.T
    np.fill_diagonal(terms, 0.0)
    counts = np.concatenate([np.ones((1, n)), _draws(n, resamples)])
    pairs = n**2 - (counts**2).sum(1) if n else np.zeros(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = SCALE * ((counts @ terms) * counts).sum(1) / pairs
    return float(values[0]), _span(values[1:])


def mmd(first: Array, second: Array) -> float:
    """CLIP-MMD between two independent sets [n, d], [m, d] of unit vectors, n and m >= 2; unbiased, no interval."""
    n, m = len(first), len(second)
    own = (_kernel(first, first).sum() - n) / (n * (n - 1)) + (_kernel(second, second).sum() - m) / (m * (m - 1))
    return float(SCALE * (own - 2 * _kernel(first, second).mean()))


def clip_kept(before: Array, after: Array, resamples: int = RESAMPLES) -> tuple[float, Interval]:
    """The share of the CLIPScore that is left, and its interval.

    Args:
        before: [n] cosines of each picture with its prompt; their positive parts have a positive sum.
        after: [n], of the same prompts and seeds.
        resamples: of the bootstrap.
    """
    first, second = np.maximum(before, 0.0), np.maximum(after, 0.0)
    draws = _draws(len(first), resamples)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = (draws @ second) / (draws @ first)
    return float(second.sum() / first.sum()), _span(values)


def margin(cosines: Array, prompts: Sequence[str]) -> float | None:
    """How much better pictures fit their own prompts than the others'; `None` if there are no others.

    Args:
        cosines: [n, n], picture i with the prompt of picture j.
        prompts: the n prompts.
    """
    other = np.array([[mine != theirs for theirs in prompts] for mine in prompts])
    if not other.any():
        return None
    return float(np.diag(cosines).mean() - cosines[other].mean())


def _kernel(a: Array, b: Array) -> Array:
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
    out: Array = np.exp(-np.maximum(squares, 0.0) / (2 * WIDTH**2))
    return out


def _draws(n: int, resamples: int) -> Array:
    """[resamples, n], how often each pair is drawn."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def _span(values: Array) -> Interval:
    low, high = np.quantile(values[np.isfinite(values)], (0.025, 0.975))
    return float(low), float(high)
