"""Proves the solve in a metric: against the dense normal equations, against the null-space formula written out, by
autograd and by perturbation, and that its curve says what the solutions do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffedit.errors import IllConditionedError, NonFiniteError, RequestError
from diffedit.linalg.curve import FACTORS, TradeOff, from_metric, from_spread
from diffedit.linalg.metric import Metric, same_marks
from diffedit.linalg.solve import ridge_factors
from tests.oracle.strategies import close, matrix

SIZES = dict(
    seed=st.integers(0, 2**32 - 1), n=st.integers(1, 12), m=st.integers(0, 8), d=st.integers(2, 10), e=st.integers(1, 6)
)
ORACLE = settings(max_examples=60, derandomize=True, deadline=None)


class Problem:
    """Random wanted rows, held rows and a moment, as numpy and torch."""

    def __init__(self, seed: int, n: int, m: int, d: int, e: int, lam: float = 0.1) -> None:
        rng = np.random.default_rng(seed)
        self.k, self.r, self.q = rng.standard_normal((n, d)), rng.standard_normal((n, e)), rng.standard_normal((m, d))
        self.root, self.lam = rng.standard_normal((d // 2 + 1, d)), lam
        self.a0 = lam * np.eye(d) + self.root.T @ self.root
        self.rows = torch.from_numpy(np.concatenate([self.k, self.q]))
        self.residuals = torch.from_numpy(self.r)
        self.metric = Metric.build(lam, torch.from_numpy(self.root), d)

    def ways(self, metric: Metric | None = None) -> list[TradeOff]:
        metric = metric or self.metric
        spreads = [metric.spread(self.rows), metric.kept().spread(self.rows)]
        n = len(self.residuals)
        blocks = [(self.rows[i : min(i + 3, n)], self.residuals[i : i + 3]) for i in range(0, n, 3)]
        held = [self.rows[i : i + 2] for i in range(n, len(self.rows), 2)]
        way, kept = (from_spread(self.rows, self.residuals, spread) for spread in spreads)
        return [way, kept, from_metric(blocks, held, metric)]

    def objective(self, change: torch.Tensor, t: float) -> torch.Tensor:
        k, q = torch.from_numpy(self.k), torch.from_numpy(self.q)
        fit = (k @ change.T - self.residuals).square().sum() + (q @ change.T).square().sum()
        return fit + t * torch.trace(change @ torch.from_numpy(self.a0) @ change.T)


def dense(curve: TradeOff, t: float) -> np.ndarray:
    up, down = curve.solve(t)
    return (up @ down).numpy()


@ORACLE
@given(**SIZES, power=st.floats(-3, 3))
def test_both_ways_solve_the_dense_normal_equations(seed, n, m, d, e, power):
    p, t = Problem(seed, n, m, d, e), 10.0**power
    expected = p.r.T @ p.k @ np.linalg.inv(t * p.a0 + p.k.T @ p.k + p.q.T @ p.q)
    for curve in p.ways():
        assert close(dense(curve, t), expected, 1e-9)


@ORACLE
@given(**SIZES)
def test_it_is_the_ridge_solve_with_a_second_moment(seed, n, m, d, e):
    p = Problem(seed, n, m, d, e)
    other = ridge_factors(
        torch.from_numpy(p.k),
        p.residuals,
        lam=p.lam,
        preserve=torch.from_numpy(p.q),
        moment_root=torch.from_numpy(p.root),
    )
    for curve in p.ways():
        assert close(dense(curve, 1.0), (other.up @ other.down).numpy(), 1e-9)
        missed, moved = curve.undone(1.0)
        assert missed / curve.wanted == pytest.approx(other.residual, rel=1e-6, abs=1e-7)
        assert moved / curve.wanted == pytest.approx(other.preserve_drift, rel=1e-6, abs=1e-7)


@ORACLE
@given(**SIZES, power=st.floats(-2, 2))
def test_first_order_optimal_and_every_step_is_worse(seed, n, m, d, e, power):
    p, t = Problem(seed, n, m, d, e), 10.0**power
    for curve in p.ways():
        best = torch.from_numpy(dense(curve, t)).requires_grad_()
        value = p.objective(best, t)
        (slope,) = torch.autograd.grad(value, best)
        (scale,) = torch.autograd.grad(p.objective(zero := torch.zeros_like(best).requires_grad_(), t), zero)
        assert float(slope.norm()) <= 1e-8 * float(scale.norm())
        step = torch.randn(best.shape, generator=torch.Generator().manual_seed(seed % 1000), dtype=torch.float64)
        for size in (1e-3, -1e-3):
            assert float(p.objective(best.detach() + size * step, t)) > value.item()


@ORACLE
@given(**SIZES, z=st.integers(1, 4))
def test_what_is_excluded_does_not_move_and_the_rest_is_optimal(seed, n, m, d, e, z):
    if z >= d:
        return
    p = Problem(seed, n, m, d, e)
    still = np.random.default_rng(seed + 1).standard_normal((z, d))
    free = np.linalg.svd(still)[2][z:].T  # [d, d - z], an orthonormal basis of what may change
    k, q = p.k @ free, p.q @ free
    expected = p.r.T @ k @ np.linalg.inv(free.T @ p.a0 @ free + k.T @ k + q.T @ q) @ free.T
    for curve in p.ways(p.metric.exclude(torch.from_numpy(still))):
        found = dense(curve, 1.0)
        assert close(found, expected, 1e-8)
        assert np.abs(found @ still.T).max() <= 1e-10 * np.abs(still).max() * max(1.0, np.abs(found).max())


def test_excluding_repeated_and_zero_inputs_excludes_their_span_once():
    p = Problem(3, 4, 0, 8, 3)
    z = torch.from_numpy(p.root[:1])
    once, more = p.metric.exclude(z), p.metric.exclude(torch.cat([z, 2 * z, 0 * z]))
    assert len(once.excluded) == len(more.excluded) == 1
    assert same_marks(once.marks, more.marks) and not same_marks(once.marks, p.metric.marks)
    assert len(p.metric.exclude(0 * z).excluded) == 0


def test_nothing_left_to_edit_is_refused():
    p = Problem(4, 2, 0, 6, 3)
    metric = p.metric.exclude(torch.cat([p.rows, torch.from_numpy(p.root[:1])]))
    with pytest.raises(IllConditionedError, match="nothing of the edit is left"):
        metric.check_room([p.rows])
    p.metric.exclude(p.rows[:1]).check_room([p.rows])  # control: the other key is free
    p.metric.check_room([p.rows])


@ORACLE
@given(**SIZES)
def test_the_curve_says_what_the_solutions_do(seed, n, m, d, e):
    p = Problem(seed, n, m, d, e)
    for curve in p.ways():
        reached = []
        for t in (1e-3, 0.1, 1.0, 10.0, 1e3):
            change = dense(curve, t)
            missed, moved = np.linalg.norm(p.k @ change.T - p.r), np.linalg.norm(p.q @ change.T)
            assert np.allclose(curve.undone(t), (missed, moved), atol=1e-6 * curve.wanted)
            assert curve.cost(t) == pytest.approx(np.trace(change @ p.a0 @ change.T), rel=1e-6, abs=1e-12)
            assert curve.efficacy(t) == pytest.approx(1 - missed / curve.wanted, abs=1e-6)
            reached.append(curve.efficacy(t))
        assert reached == sorted(reached, reverse=True)


@pytest.mark.parametrize("give_up", [0.05, 0.3, 0.8])
def test_the_chosen_factor_is_the_largest_that_keeps_to_it(give_up):
    for curve in Problem(5, 5, 3, 20, 4).ways():
        t, best = curve.choose(give_up), curve.efficacy(FACTORS[0])
        assert curve.efficacy(t) >= (1 - give_up) * best - 1e-3
        assert curve.efficacy(1.05 * t) < (1 - give_up) * best


@ORACLE
@given(**SIZES, give_up=st.floats(0.01, 0.9))
def test_the_search_that_ends_early_finds_what_forty_halvings_find(seed, n, m, d, e, give_up):
    for curve in Problem(seed, n, m, d, e).ways():
        low, high = max(FACTORS[0], min(curve.least, 1.0)), FACTORS[1]
        least = (1.0 - give_up) * curve.efficacy(low)
        for _ in range(40):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if curve.efficacy(middle) >= least else (low, middle)
        assert curve.choose(give_up) == float(f"{low:.3g}")


def test_a_scaled_request_chooses_the_same_factor():
    p = Problem(6, 5, 3, 20, 4)
    spread = p.metric.spread(p.rows)
    assert from_spread(p.rows, p.residuals, spread).choose(0.2) == from_spread(p.rows, -7 * p.residuals, spread).choose(
        0.2
    )


def test_an_ill_conditioned_moment_loses_few_digits():
    """A0 is conditioned 1e12; the SVD of the stacked rows, which squares nothing, is the oracle."""
    rng = np.random.default_rng(7)
    root = torch.from_numpy(matrix(rng, 30, 30, decades=6.0, scale=1e3))
    keys, residuals = torch.from_numpy(rng.standard_normal((8, 30))), torch.from_numpy(rng.standard_normal((8, 5)))
    lam = 1e-6
    metric = Metric.build(lam, root, 30)
    oracle = ridge_factors(keys, residuals, lam=lam, moment_root=root)
    for curve in (
        from_spread(keys, residuals, metric.spread(keys)),
        from_spread(keys, residuals, metric.kept().spread(keys)),
        from_metric([(keys, residuals)], [], metric),
    ):
        assert close(dense(curve, 1.0), (oracle.up @ oracle.down).numpy(), 1e-5)


@pytest.mark.parametrize("lam", [1.0, 1e-3, 1e-12])
def test_the_metric_of_inputs_is_that_of_their_moment(lam):
    """By Cholesky where A0 is well conditioned, by QR where it is not; in parts or at once."""
    rows = np.random.default_rng(8).standard_normal((40, 12)) * 30
    parts = [torch.from_numpy(rows[:7]), torch.from_numpy(rows[7:7]), torch.from_numpy(rows[7:])]
    found = Metric.of_inputs(lam, 100.0, parts)
    expected = lam * np.eye(12) + 100.0 * rows.T @ rows / 40
    assert np.allclose((found.root.T @ found.root).numpy(), expected, rtol=1e-12, atol=1e-9)
    assert torch.equal(found.root, found.root.triu()) and bool((found.root.diagonal() != 0).all())
    other = Metric.build(lam, torch.from_numpy(rows) * (100.0 / 40) ** 0.5, 12)
    keys = torch.from_numpy(np.random.default_rng(9).standard_normal((3, 12)))
    assert close(found.spread(keys).numpy(), other.spread(keys).numpy(), 1e-6)


def test_bad_input_is_refused():
    with pytest.raises(RequestError, match="needs inputs"):
        Metric.of_inputs(1.0, 1.0, [torch.zeros(0, 3)])
    with pytest.raises(NonFiniteError):
        Metric.of_inputs(1.0, 1.0, [torch.full((2, 3), float("nan"))])
    root = torch.eye(3, dtype=torch.float64)
    with pytest.raises(RequestError, match="positive, finite lam"):
        Metric.build(0.0, root, 3)
    with pytest.raises(RequestError, match="another width"):
        Metric.build(1.0, root, 4)
    with pytest.raises(NonFiniteError):
        Metric.build(1.0, root * float("nan"), 3)
