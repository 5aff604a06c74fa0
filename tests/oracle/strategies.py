"""Random least-squares problems with a chosen spectrum, and the dense truth in plain numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from diffedit.linalg.solve import ridge_factors


@dataclass(frozen=True)
class Problem:
    """keys [n, d_in], residuals [n, d_out], weight of each pair, lam."""

    keys: np.ndarray
    residuals: np.ndarray
    weights: np.ndarray
    lam: float


def orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def matrix(
    rng: np.random.Generator, rows: int, columns: int, *, decades: float = 1.0, scale: float = 1.0
) -> np.ndarray:
    """A matrix whose singular values fall from `scale` by `decades` powers of ten."""
    r = min(rows, columns)
    sigma = np.logspace(0, -decades, r) if r > 1 else np.ones(1)
    return scale * (orthonormal(rng, rows, r) * sigma) @ orthonormal(rng, columns, r).T


@st.composite
def problems(draw, *, min_keys: int = 1, max_decades: float = 2.0, positive_lam: bool = True) -> Problem:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, d_in, d_out = draw(st.integers(min_keys, 8)), draw(st.integers(2, 12)), draw(st.integers(1, 10))
    scale = 10.0 ** draw(st.integers(-3, 3))
    keys = matrix(rng, n, d_in, decades=draw(st.floats(0, max_decades)), scale=scale)
    residuals = rng.standard_normal((n, d_out)) * 10.0 ** draw(st.integers(-3, 3))
    weights = rng.uniform(0.25, 4.0, n)
    lam = scale**2 * 10.0 ** draw(st.floats(-4, 2)) if positive_lam else 0.0
    return Problem(keys, residuals, weights, lam)


def solve(problem: Problem, **options):
    """The code under test, with numpy in; `options` override what the problem holds."""
    given = {"lam": problem.lam, "weights": problem.weights, **options}
    tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in given.items()}
    return ridge_factors(torch.from_numpy(problem.keys), torch.from_numpy(problem.residuals), **tensors)


def change(problem: Problem, **options) -> np.ndarray:
    """The dense change [d_out, d_in] of the code under test."""
    solution = solve(problem, **options)
    return (solution.up @ solution.down).numpy()


def normal_equations(
    keys: np.ndarray,
    residuals: np.ndarray,
    lam: float,
    weights: np.ndarray | None = None,
    gram: np.ndarray | float = 0.0,
) -> np.ndarray:
    """D = R^T S K (lam I + K^T S K + gram)^-1, the textbook form, solved densely in float64."""
    s = np.diag(np.ones(len(keys)) if weights is None else weights)
    a = lam * np.eye(keys.shape[1]) + keys.T @ s @ keys + gram
    return np.linalg.solve(a, keys.T @ s @ residuals).T


def close(found: np.ndarray, wanted: np.ndarray, tol: float) -> bool:
    """|found - wanted| <= tol |wanted|."""
    return float(np.linalg.norm(found - wanted)) <= tol * float(np.linalg.norm(wanted))
