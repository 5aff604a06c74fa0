"""Proves the laws that any regularised least-squares edit obeys (reliability.md, section 4, invariants 1 to 6),
whatever the numbers: no reference solution is involved, so a shared mistake of code and oracle would show here."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle.strategies import Problem, change, close, orthonormal, problems, solve

PLAN = settings(deadline=None, derandomize=True, max_examples=50)
SEEDS = st.integers(0, 2**32 - 1)


@PLAN
@given(problems(), SEEDS)
def test_asking_for_what_is_there_changes_nothing(problem, seed):
    """v = W k gives D = 0 exactly, with a preserve key or without."""
    weight = np.random.default_rng(seed).standard_normal((problem.residuals.shape[1], problem.keys.shape[1]))
    present = problem.keys @ weight.T
    same = Problem(problem.keys, present - problem.keys @ weight.T, problem.weights, problem.lam)
    assert not change(same).any()
    assert not change(same, preserve=problem.keys[:1]).any()
    assert change(Problem(problem.keys, present + 1.0, problem.weights, problem.lam)).any()  # control


@PLAN
@given(problems(), st.integers(1, 3), SEEDS)
def test_rank_and_row_space_stay_within_the_keys(problem, copies, seed):
    """rank(D) <= number of distinct keys; D x = 0 for x orthogonal to every key."""
    rng = np.random.default_rng(seed)
    keys = np.repeat(problem.keys, copies, 0)
    many = Problem(keys, rng.standard_normal((len(keys), 6)), np.repeat(problem.weights, copies), problem.lam)
    d = change(many)
    distinct = min(len(problem.keys), keys.shape[1])
    sigma = np.linalg.svd(d, compute_uv=False)
    assert (sigma > 1e-9 * sigma[0]).sum() <= distinct
    q = np.linalg.svd(problem.keys, full_matrices=True)[2][distinct:]
    assert np.linalg.norm(d @ q.T) <= 1e-10 * np.linalg.norm(d) if len(q) else True


@PLAN
@given(problems(max_decades=1))
def test_lam_trades_strength_for_fit_monotonically(problem):
    """Growing lam: |D| falls, the residual grows; at the ends D fits (full-rank keys) and D vanishes."""
    unit = float(np.linalg.norm(problem.keys, 2)) ** 2
    grid = [unit * 10.0**e for e in range(-8, 9, 2)]
    norms = [float(np.linalg.norm(change(problem, lam=lam))) for lam in grid]
    left = [solve(problem, lam=lam).residual for lam in grid]
    assert all(a >= b * (1 - 1e-9) for a, b in itertools.pairwise(norms))
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(left))
    assert norms[-1] <= 1e-3 * norms[0]
    if len(problem.keys) <= problem.keys.shape[1]:
        assert left[0] <= 1e-4


@PLAN
@given(problems(), SEEDS)
def test_order_copies_and_zero_weights_do_not_matter(problem, seed):
    """Permuted pairs, a key given twice against weight 2, a pair of weight 0 against none: the same D."""
    d = change(problem)
    order = np.random.default_rng(seed).permutation(len(problem.keys))
    shuffled = Problem(problem.keys[order], problem.residuals[order], problem.weights[order], problem.lam)
    assert close(change(shuffled), d, 1e-10)

    twice = Problem(
        np.vstack([problem.keys, problem.keys[:1]]),
        np.vstack([problem.residuals, problem.residuals[:1]]),
        np.append(problem.weights, problem.weights[0]),
        problem.lam,
    )
    doubled = problem.weights.copy()
    doubled[0] *= 2
    assert close(change(twice), change(problem, weights=doubled), 1e-10)

    extra = np.random.default_rng(seed).standard_normal((1, problem.keys.shape[1])) * np.abs(problem.keys).max()
    absent = Problem(
        np.vstack([problem.keys, extra]),
        np.vstack([problem.residuals, np.full((1, problem.residuals.shape[1]), 9.0)]),
        np.append(problem.weights, 0.0),
        problem.lam,
    )
    assert close(change(absent), d, 1e-10)
    assert not close(change(absent, weights=np.append(problem.weights, 1.0)), d, 1e-6)  # control: weight 1 matters


@PLAN
@given(problems(), SEEDS)
def test_preserve_keys_only_ever_damp(problem, seed):
    """A heavier preserve key moves less; an enormous weight holds it still."""
    rng = np.random.default_rng(seed)
    unit = float(np.linalg.norm(problem.keys, 2))
    key = rng.standard_normal((1, problem.keys.shape[1])) * unit
    moved = [
        np.linalg.norm(change(problem, preserve=key, preserve_weights=np.array([w])) @ key.T)
        for w in (0.0, 1.0, 1e2, 1e8)
    ]
    assert close(change(problem, preserve=key, preserve_weights=np.zeros(1)), change(problem), 1e-10)
    assert all(a >= b * (1 - 1e-9) for a, b in itertools.pairwise(moved))
    assert moved[-1] <= 1e-2 * moved[0]


@PLAN
@given(problems(), st.integers(-8, 8), st.floats(-100, 100))
def test_scaling(problem, power, factor):
    """(aK, aR, a^2 lam) leaves D (exactly, for a power of two); R x c gives c D."""
    a = 2.0**power
    d = change(problem)
    scaled = Problem(problem.keys * a, problem.residuals * a, problem.weights, problem.lam * a**2)
    assert close(change(scaled), d, 1e-13)
    longer = Problem(problem.keys, problem.residuals * factor, problem.weights, problem.lam)
    assert close(change(longer), factor * d, 1e-13)


@PLAN
@given(problems(), SEEDS)
def test_rotations_pass_through(problem, seed):
    """Rotated outputs rotate D from the left, rotated inputs from the right."""
    rng = np.random.default_rng(seed)
    d_out, d_in = problem.residuals.shape[1], problem.keys.shape[1]
    q, p = orthonormal(rng, d_out, d_out), orthonormal(rng, d_in, d_in)
    d = change(problem)
    assert close(change(Problem(problem.keys, problem.residuals @ q.T, problem.weights, problem.lam)), q @ d, 1e-10)
    assert close(change(Problem(problem.keys @ p, problem.residuals, problem.weights, problem.lam)), d @ p, 1e-10)
