"""Dense changes, such as those of a fine-tuning, as low rank: the best there is, with the error that it says."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffedit.delta import Delta, LowRank
from diffedit.errors import NonFiniteError, RequestError
from diffedit.io.lora import rounding_error
from diffedit.site import EditSite, Role


def matrix(d_out: int, d_in: int, seed: int, decay: float = 1.0) -> torch.Tensor:
    """A matrix with singular values decay ** i times those of noise."""
    dense = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    left, sigma, right = torch.linalg.svd(dense, full_matrices=False)
    return (left * (sigma * decay ** torch.arange(len(sigma)))) @ right


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(0, 9), st.sampled_from([1.0, 0.5, 0.1]))
def test_a_rank_loses_exactly_the_tail_of_the_singular_values(d_out, d_in, rank, seed, decay):
    dense = matrix(d_out, d_in, seed, decay)
    sigma = torch.from_numpy(scipy.linalg.svdvals(dense.numpy()))
    kept = LowRank.from_dense(dense, rank=rank)
    assert kept.low_rank.rank == min(rank, d_out, d_in) and kept.low_rank.shape == (d_out, d_in)
    tail = float(sigma[rank:].norm() / sigma.norm())
    assert kept.error == pytest.approx(tail, rel=1e-9, abs=1e-14)
    assert kept.energy == pytest.approx(1 - tail**2, rel=1e-12)
    off = float((kept.low_rank.dense() - dense).norm() / dense.norm())
    assert off == pytest.approx(kept.error, rel=1e-6, abs=1e-13)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(2, 10), st.integers(2, 10), st.integers(0, 9), st.floats(0.01, 1.0))
def test_an_energy_takes_the_fewest_that_hold_it(d_out, d_in, seed, energy):
    dense = matrix(d_out, d_in, seed, 0.7)
    squares = torch.from_numpy(scipy.linalg.svdvals(dense.numpy())).square()
    kept = LowRank.from_dense(dense, energy=energy)
    held = squares.cumsum(0) / squares.sum()
    assert kept.energy >= energy - 1e-12
    assert kept.low_rank.rank == 1 or float(held[kept.low_rank.rank - 2]) < energy + 1e-12
    assert kept.error == pytest.approx((1 - kept.energy) ** 0.5, abs=1e-7)


def test_no_matrix_of_that_rank_is_closer():
    """Against perturbed factors and against another choice of singular vectors."""
    dense = matrix(9, 7, 0, 0.8)
    kept = LowRank.from_dense(dense, rank=3)
    best = float((kept.low_rank.dense() - dense).norm())
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        step = torch.randn(9, 3, generator=generator, dtype=torch.float64) * 1e-3
        assert float((LowRank(kept.low_rank.up + step, kept.low_rank.down).dense() - dense).norm()) > best


def test_factors_are_balanced_and_exact_where_the_matrix_is_low_rank():
    low = LowRank(torch.randn(20, 2) * 1e6, torch.randn(2, 30) * 1e-6)
    kept = LowRank.from_dense(low.dense(), energy=1 - 1e-12)
    assert kept.low_rank.rank == 2 and kept.error < 1e-6
    assert torch.allclose(kept.low_rank.dense(), low.dense(), rtol=1e-9, atol=1e-9)
    assert torch.allclose(kept.low_rank.up.norm(dim=0), kept.low_rank.down.norm(dim=1))
    site = EditSite("text_encoder", "text_model.encoder.layers.0.mlp.fc2", 0, Role.TEXT_MLP_OUT, 20, 30)
    assert rounding_error(Delta({site: kept.low_rank}), torch.float16) < 6e-4


def test_half_precision_and_zero_matrices():
    half = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).half()
    assert torch.allclose(LowRank.from_dense(half, rank=5).low_rank.dense(), half.double(), atol=1e-12)
    zero = LowRank.from_dense(torch.zeros(3, 4), energy=0.9)
    assert (zero.low_rank.rank, zero.error, zero.energy) == (1, 0.0, 1.0) and zero.low_rank.norm() == 0.0


@pytest.mark.parametrize(
    ("dense", "options", "error"),
    [
        (torch.ones(2, 3), {}, RequestError),
        (torch.ones(2, 3), {"rank": 1, "energy": 0.5}, RequestError),
        (torch.ones(2, 3), {"rank": 0}, RequestError),
        (torch.ones(2, 3), {"energy": 0.0}, RequestError),
        (torch.ones(2, 3), {"energy": 1.5}, RequestError),
        (torch.ones(2, 3), {"energy": float("nan")}, RequestError),
        (torch.ones(3), {"rank": 1}, RequestError),
        (torch.ones(0, 3), {"rank": 1}, RequestError),
        (torch.tensor([[1.0, float("inf")]]), {"rank": 1}, NonFiniteError),
    ],
)
def test_bad_input(dense, options, error):
    with pytest.raises(error):
        LowRank.from_dense(dense, **options)
