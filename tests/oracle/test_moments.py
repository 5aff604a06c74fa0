"""Proves the streamed second moment and the rank-one edit on it: against dense numpy, SciPy's constrained minimum and
high-precision arithmetic where forming the moment would lose the digits."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffedit.errors import IllConditionedError, NonFiniteError, RequestError
from diffedit.linalg.moments import SecondMoment, constrained_factors
from diffedit.linalg.solve import ridge_factors
from tests.oracle.strategies import close, matrix


def moment_of(rows: np.ndarray) -> SecondMoment:
    return SecondMoment(rows.shape[1]).add(torch.from_numpy(rows))


def change(keys, residuals, root) -> np.ndarray:
    found = constrained_factors(torch.from_numpy(keys), torch.from_numpy(residuals), root)
    return (found.up @ found.down).numpy()


def draw(seed: int, n: int, d: int, d_out: int, count: int):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), rng.standard_normal((n, d_out)), rng.standard_normal((count, d))


SIZES = dict(seed=st.integers(0, 2**32 - 1), d=st.integers(2, 10), d_out=st.integers(1, 8), data=st.data())


@settings(max_examples=40, derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), d=st.integers(1, 8), cuts=st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_the_stream_is_the_sum_however_it_is_cut(seed, d, cuts):
    rng = np.random.default_rng(seed)
    blocks = [rng.standard_normal((n, d)) for n in (*cuts, 1)]
    moment = SecondMoment(d)
    for block in blocks:
        moment.add(torch.from_numpy(block))
    rows = np.concatenate(blocks)
    root = moment.root()
    assert moment.count == len(rows) and torch.equal(root, root.triu()) and root.shape == (d, d)
    assert np.allclose((root.T @ root).numpy(), rows.T @ rows / len(rows), atol=1e-12)
    ridge = moment.root(0.5)
    mean = rows.T @ rows / len(rows)
    assert np.allclose((ridge.T @ ridge).numpy(), mean + 0.5 * np.trace(mean) / d * np.eye(d), atol=1e-12)
    again = SecondMoment.restore(moment.total_root, moment.count)
    assert torch.equal(again.root(), root)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(**SIZES)
def test_several_keys_against_the_dense_formula(seed, d, d_out, data):
    n = data.draw(st.integers(1, d))
    keys, residuals, rows = draw(seed, n, d, d_out, 3 * d)
    c = np.linalg.inv(rows.T @ rows / len(rows))
    wanted = residuals.T @ np.linalg.inv(keys @ c @ keys.T) @ keys @ c
    found = change(keys, residuals, moment_of(rows).root())
    assert close(found, wanted, 1e-7) and close(found @ keys.T, residuals.T, 1e-9)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(**SIZES)
def test_one_key_is_the_published_rank_one_update(seed, d, d_out, data):
    """D = (v* - W k) (C^-1 k)^T / (k^T C^-1 k)."""
    keys, residuals, rows = draw(seed, 1, d, d_out, 4 * d)
    direction = np.linalg.solve(rows.T @ rows / len(rows), keys[0])
    wanted = np.outer(residuals[0], direction) / (keys[0] @ direction)
    assert close(change(keys, residuals, moment_of(rows).root()), wanted, 1e-9)


def test_it_is_the_least_change_and_every_other_is_larger():
    """First order: the Lagrangian's gradient lies in the span of the keys; second: feasible steps only cost."""
    keys, residuals, rows = draw(1, 3, 7, 5, 40)
    moment, root = torch.from_numpy(rows.T @ rows / len(rows)), moment_of(rows).root()
    best = torch.from_numpy(change(keys, residuals, root)).requires_grad_()

    def cost(d):
        return torch.trace(d @ moment @ d.T)

    (slope,) = torch.autograd.grad(cost(best), best)
    span = torch.from_numpy(np.linalg.qr(keys.T)[0])
    outside = slope - slope @ span @ span.T
    assert float(outside.norm()) <= 1e-10 * float(slope.norm())
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = torch.randn(5, 7, generator=generator, dtype=torch.float64)
        step -= step @ span @ span.T
        assert float(cost((best + 1e-3 * step).detach())) > float(cost(best).detach())


def test_ridge_with_a_vanishing_lam_tends_to_it():
    keys, residuals, rows = draw(2, 2, 6, 4, 30)
    root = moment_of(rows).root()
    hard = change(keys, residuals, root)
    gaps = []
    for weight in (1e2, 1e4, 1e6):
        k, r = torch.from_numpy(keys), torch.from_numpy(residuals)
        soft = ridge_factors(k, r, lam=0.0, weights=torch.full((2,), weight).double(), moment_root=root)
        gaps.append(float(np.linalg.norm((soft.up @ soft.down).numpy() - hard)))
    assert gaps[0] > 30 * gaps[1] > 900 * gaps[2]


def test_a_moment_conditioned_1e12_keeps_its_digits():
    """Against 60-digit arithmetic; the textbook inverse of the moment in float64 has lost them."""
    rng = np.random.default_rng(5)
    rows = matrix(rng, 40, 6, decades=6.0)  # the moment is conditioned 1e12
    keys, residuals = rng.standard_normal((1, 6)), rng.standard_normal((1, 3))
    mpmath.mp.dps = 60
    exact = mpmath.matrix(rows.tolist())
    c = (exact.T * exact) / 40
    k = mpmath.matrix(keys.T.tolist())
    direction = mpmath.lu_solve(c, k)
    wanted = np.outer(residuals[0], [float(x / (k.T * direction)[0]) for x in direction])
    assert close(change(keys, residuals, moment_of(rows).root()), wanted, 1e-8)
    # control: the moment formed and inverted, as the scripts do it
    naive = np.linalg.inv((rows.T @ rows / 40).astype(np.float32)).astype(float) @ keys[0]
    assert not close(np.outer(residuals[0], naive) / (keys[0] @ naive), wanted, 1e-2)


def test_bad_input_is_refused():
    keys, residuals, rows = (torch.from_numpy(x) for x in draw(3, 2, 5, 4, 3))
    moment = SecondMoment(5).add(rows)
    with pytest.raises(IllConditionedError, match="no inverse"):  # three inputs in five directions
        constrained_factors(keys, residuals, moment.root())
    assert constrained_factors(keys, residuals, moment.root(1e-3)).condition < 1e6
    with pytest.raises(IllConditionedError, match="depend on each other"):
        constrained_factors(keys[[0, 0]], residuals, torch.eye(5))
    with pytest.raises(IllConditionedError, match="depend on each other"):
        constrained_factors(
            torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), rows[:1].repeat(6, 1), torch.eye(5)
        )
    with pytest.raises(RequestError, match="do not fit"):
        constrained_factors(keys, residuals[:1], torch.eye(5))
    with pytest.raises(RequestError, match="do not fit"):
        constrained_factors(keys[:0], residuals[:0], torch.eye(5))
    with pytest.raises(RequestError, match="another width"):
        moment.add(rows[:, :4])
    with pytest.raises(NonFiniteError, match="not finite"):
        moment.add(rows * float("nan"))
    with pytest.raises(RequestError, match="needs inputs"):
        SecondMoment(5).root()
    with pytest.raises(RequestError, match="square root and a count"):
        SecondMoment.restore(rows, 3)
