"""Proves that the algebra on thin factors is the algebra of the dense matrices, for any shape and rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffedit.delta import Delta, Diagnostics, LowRank
from diffedit.errors import NonFiniteError, RequestError
from tests.unit.toy import SITES, change

PLAN = settings(deadline=None, derandomize=True, max_examples=80)


def low_rank(d_out: int, d_in: int, rank: int, seed: int, scale: float = 1.0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(d_out, rank, generator=generator, dtype=torch.float64) * scale
    return LowRank(up, torch.randn(rank, d_in, generator=generator, dtype=torch.float64) / scale)


@st.composite
def pairs(draw):
    d_out, d_in = draw(st.integers(1, 7)), draw(st.integers(1, 7))

    def make() -> LowRank:
        rank, seed, power = draw(st.integers(0, 9)), draw(st.integers(0, 2**31)), draw(st.integers(-5, 5))
        return low_rank(d_out, d_in, rank, seed, 10.0**power)

    return make(), make()


def near(found: torch.Tensor, wanted: torch.Tensor, tol: float = 1e-12) -> bool:
    return float((found - wanted).norm()) <= tol * max(float(wanted.norm()), 1e-300)


@PLAN
@given(pairs(), st.floats(-1e3, 1e3))
def test_sum_scale_and_norm_are_those_of_the_dense_matrices(pair, factor):
    a, b = pair
    scale = float(a.dense().norm() + b.dense().norm())
    assert float(((a + b).dense() - (a.dense() + b.dense())).norm()) <= 1e-13 * scale
    assert (a + b).rank == a.rank + b.rank and (a + b).shape == a.shape
    assert near(a.scale(factor).dense(), factor * a.dense())
    assert a.norm() == pytest.approx(float(a.dense().norm()), rel=1e-6, abs=1e-12)


@PLAN
@given(pairs())
def test_compress_is_exact_minimal_and_balanced(pair):
    a, b = pair
    redundant = a + b + a  # rank at most that of a + b, written with more factors
    small, dense = redundant.compress(), redundant.dense()
    assert near(small.dense(), dense, 1e-10)
    sigma = torch.linalg.svdvals(dense)
    true_rank = int((sigma > 1e-10 * sigma[0]).sum()) if float(sigma[0]) > 0 else 0
    assert true_rank <= small.rank <= max(min(dense.shape), 0)
    if true_rank:
        root = sigma[: small.rank].sqrt()
        assert torch.allclose(small.up.norm(dim=0), root, rtol=1e-6, atol=1e-6 * float(root[0]))
        assert torch.allclose(small.down.norm(dim=1), root, rtol=1e-6, atol=1e-6 * float(root[0]))


def test_compress_drops_what_is_below_the_tolerance_and_no_more():
    sigma = torch.tensor([1.0, 1e-3, 1e-9], dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    matrix = LowRank(q * sigma, q.T.contiguous())
    assert [matrix.compress(tol).rank for tol in (1e-12, 1e-6, 1e-2)] == [3, 2, 1]
    lost = (matrix.compress(1e-6).dense() - matrix.dense()).norm()
    assert float(lost) == pytest.approx(1e-9, rel=1e-3)  # truncation error = the tail


def test_balancing_is_what_keeps_half_precision():
    """The control: the same matrix with lopsided factors overflows in float16."""
    lopsided = LowRank(torch.ones(3, 1) * 1e6, torch.ones(1, 3) * 1e-6)
    assert not torch.isfinite(lopsided.to(torch.float16).dense()).all()
    assert near(lopsided.compress().to(torch.float16).dense(), lopsided.dense(), 1e-3)


def test_factors_must_multiply():
    for up, down in ((torch.ones(3, 2), torch.ones(3, 4)), (torch.ones(3), torch.ones(3, 4))):
        with pytest.raises(RequestError, match="factors do not multiply"):
            LowRank(up, down)
    with pytest.raises(RequestError, match=r"\(3, 4\) and \(2, 4\)"):
        low_rank(3, 4, 1, 0) + low_rank(2, 4, 1, 0)


def test_check_finite_counts_and_names():
    bad = LowRank(torch.tensor([[float("nan")], [1.0]]), torch.tensor([[float("inf"), -float("inf")]]))
    with pytest.raises(NonFiniteError, match="the change of here is not finite: 3 numbers"):
        bad.check_finite("here")
    low_rank(2, 2, 1, 0).check_finite("here")


def test_delta_is_sorted_frozen_and_checks_shapes():
    first, second = change(1).factors.values()
    delta = Delta({SITES[1]: second, SITES[0]: first})
    assert delta.sites == SITES == tuple(site for site, _ in delta)
    with pytest.raises(TypeError):
        delta.factors[SITES[0]] = second
    with pytest.raises(RequestError, match=r"does not fit .*layers\.0.*\(5, 6\) for \(6, 5\)"):
        Delta({SITES[0]: LowRank(torch.ones(5, 1), torch.ones(1, 6))})


def test_delta_sums_site_by_site():
    a, b = change(1), change(2, sites=SITES[1:])
    both = a + b
    assert torch.equal(both.factors[SITES[0]].dense(), a.factors[SITES[0]].dense())
    assert near(both.factors[SITES[1]].dense(), a.factors[SITES[1]].dense() + b.factors[SITES[1]].dense())
    half, twice = a * 0.5, 2 * a
    for site in SITES:
        assert torch.equal(half.factors[site].dense() * 4, twice.factors[site].dense())
    assert a.nbytes == 2 * (6 * 2 + 2 * 5) * 4
    assert a.to(torch.float64).nbytes == 2 * a.nbytes


def test_diagnostics_survive_what_keeps_the_change_the_same():
    diagnostics = {SITES[0]: Diagnostics(1.0, 2, 0.0, 0.0, 0.1, 3, 0)}
    delta = Delta(change(1).factors, diagnostics)
    assert dict(delta.compress().diagnostics) == dict(delta.to(torch.float64).diagnostics) == diagnostics
    assert not (delta + delta).diagnostics
