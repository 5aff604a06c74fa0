"""Proves that `ridge_factors` gives the answer that independent computations give: numpy normal equations, augmented
least squares, SciPy's minimum norm, 50-digit arithmetic, and the calculus of the objective itself."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffedit.errors import IllConditionedError, NonFiniteError, RequestError
from diffedit.linalg.solve import ridge_factors
from tests.oracle.strategies import change, close, matrix, normal_equations, orthonormal, problems, solve

PLAN = settings(deadline=None, derandomize=True, max_examples=60)


@PLAN
@given(problems())
def test_equals_the_normal_equations(problem):
    wanted = normal_equations(problem.keys, problem.residuals, problem.lam, problem.weights)
    assert close(change(problem), wanted, 1e-8)


@PLAN
@given(problems(max_decades=4))
def test_equals_augmented_least_squares(problem):
    root = np.sqrt(problem.weights)[:, None]
    d = problem.keys.shape[1]
    rows = np.vstack([root * problem.keys, np.sqrt(problem.lam) * np.eye(d)])
    wanted = np.vstack([root * problem.residuals, np.zeros((d, problem.residuals.shape[1]))])
    assert close(change(problem), scipy.linalg.lstsq(rows, wanted)[0].T, 1e-9)


def _exact(keys, residuals, lam, weights) -> np.ndarray:
    """The change in 50-digit arithmetic from the very same float64 numbers."""
    with mpmath.workdps(50):
        k, r = mpmath.matrix(keys.tolist()), mpmath.matrix(residuals.tolist())
        s = mpmath.diag([mpmath.mpf(float(w)) for w in weights])
        a = k.T * s * k + mpmath.mpf(float(lam)) * mpmath.eye(keys.shape[1])
        out = mpmath.lu_solve(a, (k.T * s * r)) if r.cols == 1 else mpmath.inverse(a) * (k.T * s * r)
        return np.array(out.T.tolist(), dtype=float)


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e8, 1e12])
@pytest.mark.parametrize(("n", "d_in"), [(5, 12), (6, 6), (9, 5)])
def test_keeps_eight_digits_where_a_is_conditioned_1e12(condition, n, d_in):
    """A is conditioned `condition`; the field's float32 inverse is meaningless from 1e8 on (control below)."""
    rng = np.random.default_rng(int(np.log10(condition)) + n)
    keys = matrix(rng, n, d_in, decades=np.log10(condition) / 2)
    residuals, weights = rng.standard_normal((n, 2)), rng.uniform(0.5, 2, n)
    lam = 1.0 / condition
    wanted = _exact(keys, residuals, lam, weights)
    solution = ridge_factors(*map(torch.from_numpy, (keys, residuals)), lam=lam, weights=torch.from_numpy(weights))
    assert close((solution.up @ solution.down).numpy(), wanted, 1e-10 if condition <= 1e8 else 1e-8)
    if condition >= 1e8:
        single = torch.from_numpy(keys).float()
        gram = single.T @ (single * torch.from_numpy(weights).float()[:, None]) + lam * torch.eye(d_in)
        inverse, _ = torch.linalg.inv_ex(gram)
        naive = torch.from_numpy(residuals * weights[:, None]).float().T @ single @ inverse
        assert not close(naive.double().numpy(), wanted, 1e-2)


def test_weak_directions_count_as_long_as_lam_is_positive():
    """A key direction 1e-12 times the strongest is noise without lam but part of the answer with it (cond A 1e6)."""
    rng = np.random.default_rng(3)
    keys = orthonormal(rng, 4, 2).T * np.array([[1.0], [0.9e-12]])
    residuals = np.array([[0.0], [1.0]])
    wanted = _exact(keys, residuals, 1e-6, np.ones(2))
    solution = ridge_factors(*map(torch.from_numpy, (keys, residuals)), lam=1e-6)
    assert close((solution.up @ solution.down).numpy(), wanted, 1e-3)


@PLAN
@given(problems())
def test_gradient_vanishes_and_perturbed_answers_are_worse(problem):
    keys, residuals, weights = (torch.from_numpy(x) for x in (problem.keys, problem.residuals, problem.weights))

    def objective(d: torch.Tensor) -> torch.Tensor:
        return (weights[:, None] * (keys @ d.T - residuals) ** 2).sum() + problem.lam * (d**2).sum()

    best = torch.from_numpy(change(problem)).requires_grad_()
    value = objective(best)
    (gradient,) = torch.autograd.grad(value, best)
    (at_zero,) = torch.autograd.grad(objective(zero := torch.zeros_like(best).requires_grad_()), zero)
    assert float(gradient.norm()) <= 1e-9 * float(at_zero.norm())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        step = torch.randn(best.shape, generator=generator, dtype=torch.float64)
        step *= 1e-2 * float(best.detach().norm()) / float(step.norm())
        assert float(objective(best.detach() + step)) > float(value.detach())


@PLAN
@given(problems(), st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_preserve_keys_and_moment_equal_the_dense_formula(problem, seed, with_preserve, with_moment):
    """D = R^T S K (lam I + K^T S K + Q^T P Q + M^T M)^-1."""
    rng, d = np.random.default_rng(seed), problem.keys.shape[1]
    scale = float(np.linalg.norm(problem.keys, 2))
    preserve, p = matrix(rng, 3, d, scale=scale), rng.uniform(0.1, 10, 3)
    root = matrix(rng, 4, d, scale=scale)
    options, gram = {}, np.zeros((d, d))
    if with_preserve:
        options |= {"preserve": preserve, "preserve_weights": p}
        gram = gram + preserve.T @ np.diag(p) @ preserve
    if with_moment:
        options |= {"moment_root": root}
        gram = gram + root.T @ root
    wanted = normal_equations(problem.keys, problem.residuals, problem.lam, problem.weights, gram)
    assert close(change(problem, **options), wanted, 1e-8)


@PLAN
@given(problems(positive_lam=False, max_decades=3))
def test_without_lam_it_is_the_minimum_norm_solution(problem):
    root = np.sqrt(problem.weights)[:, None]
    wanted = (np.linalg.pinv(root * problem.keys) @ (root * problem.residuals)).T
    assert close(change(problem), wanted, 1e-8)


def test_without_lam_a_repeated_key_is_averaged_not_amplified():
    """Rank-deficient keys: 1/s of a rounding-noise direction would blow up; the pseudo-inverse drops it."""
    rng = np.random.default_rng(5)
    keys = rng.standard_normal((1, 6)).repeat(3, 0) * np.array([[1.0], [1.0], [2.0]])
    residuals = rng.standard_normal((3, 4))
    found = ridge_factors(*map(torch.from_numpy, (keys, residuals)), lam=0.0)
    assert found.effective_rank == 1
    assert close((found.up @ found.down).numpy(), (np.linalg.pinv(keys, rcond=1e-10) @ residuals).T, 1e-12)


@PLAN
@given(problems(), st.integers(0, 2**32 - 1))
def test_diagnostics_are_what_they_say(problem, seed):
    rng = np.random.default_rng(seed)
    preserve = matrix(rng, 2, problem.keys.shape[1], scale=float(np.linalg.norm(problem.keys, 2)))
    solution = solve(problem, preserve=preserve)
    d, root = (solution.up @ solution.down).numpy(), np.sqrt(problem.weights)[:, None]
    asked = float(np.linalg.norm(root * problem.residuals))
    left = np.linalg.norm(root * (problem.residuals - problem.keys @ d.T)) / asked
    assert solution.residual == pytest.approx(left, rel=1e-6, abs=1e-9)
    assert 0 <= solution.residual <= 1 + 1e-12
    assert solution.preserve_drift == pytest.approx(np.linalg.norm(preserve @ d.T) / asked, rel=1e-6, abs=1e-9)
    sigma = np.linalg.svd(np.vstack([root * problem.keys, preserve]), compute_uv=False)
    assert solution.effective_rank == int((sigma > 1e-14 * sigma[0]).sum())
    wanted = (sigma[0] ** 2 + problem.lam) / (sigma[solution.effective_rank - 1] ** 2 + problem.lam)
    assert solution.condition == pytest.approx(wanted, rel=1e-6)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 6, generator=generator), torch.randn(3, 4, generator=generator)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_the_callers_settings_do_not_matter(pair, default, autocast, inference):
    """float64 bits are the same under autocast, another default dtype and inference mode."""
    plain = ridge_factors(*pair, lam=0.1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.inference_mode(inference):
            found = ridge_factors(*pair, lam=0.1)
    finally:
        torch.set_default_dtype(before)
    assert found.up.dtype is found.down.dtype is torch.float64
    assert torch.equal(found.up, plain.up) and torch.equal(found.down, plain.down)


@pytest.mark.parametrize("where", ["keys", "residuals", "preserve", "moment_root"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_numbers_are_refused_by_name_and_count(pair, where, value):
    given = {"keys": pair[0].clone(), "residuals": pair[1].clone()}
    given |= {"preserve": torch.ones(2, 6), "moment_root": torch.ones(2, 6)}
    given[where][0, 1] = value
    with pytest.raises(NonFiniteError, match=rf"{where}.*1 of {given[where].numel()}"):
        ridge_factors(given.pop("keys"), given.pop("residuals"), lam=0.1, **given)


REFUSED = {
    "negative lam": dict(lam=-1.0),
    "nan lam": dict(lam=float("nan")),
    "infinite lam": dict(lam=float("inf")),
    "negative weight": dict(weights=torch.tensor([1.0, -1.0, 1.0])),
    "nan weight": dict(weights=torch.tensor([1.0, float("nan"), 1.0])),
    "too few weights": dict(weights=torch.ones(2)),
    "negative preserve weight": dict(preserve=torch.ones(1, 6), preserve_weights=-torch.ones(1)),
    "too many preserve weights": dict(preserve=torch.ones(1, 6), preserve_weights=torch.ones(2)),
    "narrow preserve keys": dict(preserve=torch.ones(1, 5)),
    "preserve vector": dict(preserve=torch.ones(6)),
    "narrow moment": dict(moment_root=torch.ones(2, 5)),
    "all weights zero": dict(weights=torch.zeros(3)),
    "all weights zero, preserve not": dict(weights=torch.zeros(3), preserve=torch.ones(1, 6)),
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED.keys())
def test_impossible_options_are_refused(pair, options):
    with pytest.raises(RequestError) as caught:
        ridge_factors(*pair, **{"lam": 0.1, **options})
    assert caught.value.code == "DE-100"


BAD_PAIRS = {
    "no keys": (torch.zeros(0, 6), torch.zeros(0, 4)),
    "unequal numbers": (torch.ones(3, 6), torch.ones(2, 4)),
    "a vector": (torch.ones(6), torch.ones(1, 4)),
    "zero keys": (torch.zeros(2, 6), torch.ones(2, 4)),
}


@pytest.mark.parametrize("given_", BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
@pytest.mark.parametrize("preserve", [None, torch.ones(1, 6)], ids=["alone", "beside preserve keys"])
def test_keys_that_cannot_carry_an_edit_are_refused(given_, preserve):
    with pytest.raises(RequestError):
        ridge_factors(*given_, lam=0.1, preserve=preserve)


def test_ill_conditioned_keys_are_refused_and_lam_cures_them(pair):
    keys = pair[0].double()
    keys[1] = keys[0] + 1e-9 * keys[1]
    with pytest.raises(IllConditionedError, match=r"condition .*aise lam"):
        ridge_factors(keys, pair[1], lam=0.0)
    assert ridge_factors(keys, pair[1], lam=1e-3).condition < 1e6
