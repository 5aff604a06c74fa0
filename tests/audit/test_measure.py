"""Planted differences are found with their rank and size; rounding is told apart from change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffedit.audit import measure
from diffedit.audit.measure import compare
from tests.audit.conftest import low_rank

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def weight(rows=96, columns=64, seed=1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03


@pytest.mark.parametrize(
    ("stored", "read", "size"),
    [(F32, F32, 1e-4), (F64, F64, 1e-9), (F16, F16, 0.01), (F32, F16, 0.01), (F16, F32, 0.01), (BF16, BF16, 0.1)],
)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rank_and_size_of_a_planted_change(stored, read, size, rank):
    before = weight().double().to(stored)
    after = (before.double() + low_rank(before, rank, size)).to(read)
    found = compare(before, after)
    assert found.state == "changed" and found.rank == rank and not found.rank_is_bound
    exact = after.double() - before.double()
    assert found.norm == pytest.approx(float(np.linalg.norm(exact.numpy())), rel=1e-12)
    assert found.relative_norm == pytest.approx(found.norm / np.linalg.norm(before.double().numpy()), rel=1e-12)
    assert found.relative_norm == pytest.approx(size, rel=0.15)
    values = np.linalg.svd(exact.numpy(), compute_uv=False)
    assert np.allclose(found.singular_values, values[: len(found.singular_values)], rtol=1e-9)
    assert values[rank - 1] > found.floor > values[rank]


@pytest.mark.parametrize("narrow", [F16, BF16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_copy_in_another_precision_is_rounding_only(narrow):
    full = weight()
    half = full.to(narrow)
    for one, other in ((full, half), (half, full), (full, half.to(F32)), (half.to(F32), full)):
        found = compare(one, other)
        assert found.state == "rounding" and found.rank is None
        assert found.rows == int((one.to(F32) != other.to(F32)).any(1).sum())
    assert compare(half, half.to(F32)) is None  # the same numbers


def test_two_different_roundings_of_one_tensor_are_rounding_only():
    full = weight()
    assert compare(full.to(F16), full.to(BF16)).state == "rounding"
    assert compare(full.to(BF16).to(F32), full.to(F16)).state == "rounding"


def test_an_edit_in_half_precision_is_no_rounding():
    """The other side of the coin: most entries move by two steps at most, and yet it is an edit."""
    before = weight(256, 256).to(F16)
    after = (before.double() + low_rank(before, 1, 0.001)).to(F16)
    step = (after.double() - before.double()).abs() / before.double().abs().clamp_min(1e-4)
    assert float((step <= 2 * 2**-10).double().mean()) > 0.7
    found = compare(before, after)
    assert found.state == "changed" and found.rank == 1


def test_half_precision_numbers_in_a_float32_file_get_the_floor_of_half_precision():
    before = weight()
    after = (before.double() + low_rank(before, 4, 0.05)).to(F16).to(F32)
    assert compare(before, after).rank == 4


def test_an_edit_of_a_half_precision_base_kept_in_float32_is_seen_below_the_bases_rounding():
    before = weight(256, 256).to(F16).to(F32)
    after = (before.double() + low_rank(before, 5, 2e-5)).to(F32)
    assert compare(before, after).rank == 5


def test_an_edit_of_the_original_is_seen_through_the_rounding_of_the_base():
    original = weight()
    found = compare(original.to(F16), (original.double() + low_rank(original, 5, 0.05)).to(F32))
    assert found.rank == 5


def test_a_change_of_full_rank():
    before = weight()
    assert compare(before, before + 0.1 * weight(seed=2)).rank == 64


def test_repeated_rounding_is_below_the_noise():
    before, other = weight(), weight(seed=3)
    found = compare(before, (before + other) - other)
    assert found.state == "rounding" or found.rank == 0


def test_equal_tensors_do_not_differ():
    one = weight()
    assert compare(one, one.clone()) is None
    assert compare(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])) is None
    assert compare(torch.arange(4), torch.arange(4, dtype=torch.int32)) is None
    odd = torch.tensor([1.0, float("nan"), float("inf")])
    assert compare(odd, odd.to(F16)) is None


def test_only_the_rows_that_differ_count():
    before = weight()
    after = before.clone()
    after[[3, 17]] += 0.001 * weight(2, 64, seed=5)
    found = compare(before, after)
    assert found.rows == 2 and found.rank == 2


def test_vectors_have_no_rank_and_kernels_are_matrices():
    bias = torch.linspace(0.1, 1.0, 10)
    found = compare(bias, bias * 1.01)
    assert found.rank is None and found.rows == 10 and found.relative_norm == pytest.approx(0.01, rel=1e-4)
    kernel = torch.randn(12, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    assert compare(kernel, (kernel.double() + low_rank(kernel, 2, 0.1)).float()).rank == 2
    assert compare(torch.tensor(1.0), torch.tensor(2.0)).state == "changed"


def test_whole_numbers_are_changed_or_not():
    found = compare(torch.arange(6).reshape(3, 2), torch.tensor([[0, 1], [2, 4], [4, 5]]))
    assert found.state == "changed" and found.rows == 1 and found.rank is None


def test_what_is_not_finite_is_said():
    before = weight()
    after = before.clone()
    after[2, 5] = float("nan")
    found = compare(before, after)
    assert found.state == "not finite" and found.rows == 1


def test_a_base_of_zeros_has_no_relative_size():
    found = compare(torch.zeros(4, 4), torch.eye(4))
    assert found.relative_norm is None and found.norm == 2.0 and found.rank == 4


@pytest.mark.parametrize("kind", [F32, F16])
def test_large_matrices_are_probed_with_the_same_answer(kind):
    before = weight(400, 300).to(kind)
    after = (before.double() + low_rank(before, 12, 0.05)).to(kind)
    found = compare(before, after)
    assert found.rank == 12 and not found.rank_is_bound
    exact = np.linalg.svd((after.double() - before.double()).numpy(), compute_uv=False)
    assert np.allclose(found.singular_values, exact[:8], rtol=1e-6)


def test_a_high_rank_of_a_large_matrix_is_a_bound_and_below_that_size_exact(monkeypatch):
    before = weight(400, 300)
    after = before + weight(400, 300, seed=9)
    assert compare(before, after).rank == 300
    monkeypatch.setattr(measure, "EXACT", 200)
    found = compare(before, after)
    assert found.rank_is_bound and measure.SURE < found.rank <= 300
    assert all(np.isfinite(found.singular_values))


def test_inputs_span_the_row_space():
    before = weight()
    change = low_rank(before, 3, 0.1)
    found = compare(before, (before.double() + change).float(), want_inputs=True)
    assert found.inputs.shape == (3, 64) and float(found.inputs.norm()) == pytest.approx(1.0)
    basis = torch.linalg.qr(found.inputs.T).Q
    assert float((change - change @ basis @ basis.T).norm() / change.norm()) < 1e-4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(2, 24),
    columns=st.integers(2, 24),
    rank=st.integers(1, 6),
    kind=st.sampled_from([F32, F16, BF16]),
    exponent=st.integers(-8, 4),
    seed=st.integers(0, 999),
)
def test_rank_never_exceeds_the_planted_one_at_any_scale(rows, columns, rank, kind, exponent, seed):
    rank = min(rank, rows, columns)
    scale = 2.0**exponent
    before = (weight(rows, columns, seed) * scale).to(kind)
    after = (before.double() + low_rank(before, rank, 0.5, seed)).to(kind)
    found = compare(before, after)
    assert found.state == "changed"
    assert found.rank <= rank
    if kind is F32:
        assert found.rank == rank
