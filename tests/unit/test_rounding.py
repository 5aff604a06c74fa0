"""One pass over blocks gives what the dense formula says; norms and bits are compared as they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from diffedit import rounding
from diffedit.delta import LowRank
from diffedit.errors import NonFiniteError
from diffedit.rounding import Hashing, Known, cast_hashes, frobenius, rounded_sum, same_bits, tensor_hash
from diffedit.site import EditSite, Role

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def site(rows: int, columns: int) -> EditSite:
    return EditSite("text_encoder", "text_model.layer", 0, Role.TEXT_SELF_ATTN_OUT, rows, columns)


def change(rows: int, columns: int, rank: int, seed: int, size: float = 0.1) -> LowRank:
    random = torch.Generator().manual_seed(seed)
    return LowRank(
        size * torch.randn(rows, rank, generator=random), size * torch.randn(rank, columns, generator=random)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "block"), [(7, 5, 10), (40, 33, 1 << 17), (9, 40, 3)])
def test_blocks_are_the_dense_formula(dtype, rows, columns, block, monkeypatch):
    monkeypatch.setattr(rounding, "_BLOCK", block)
    base = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    changes = [change(rows, columns, 2, 1), change(rows, columns, 3, 2)]
    made = rounded_sum(site(rows, columns), base, changes)
    weight = made.weight
    wanted = sum(c.up.double() @ c.down.double() for c in changes)
    expected = (base.double() + wanted).to(dtype)
    torch.testing.assert_close(weight, expected, rtol=torch.finfo(dtype).eps, atol=1e-15)  # at most a tie apart
    got = float((wanted * (weight.double() - base.double())).sum())
    assert made.got == pytest.approx(got, rel=1e-12 if dtype is torch.float64 else 1e-5)
    assert made.hashing.sha256 == tensor_hash(weight)
    assert weight.dtype is dtype and base.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 11])
def test_what_is_not_finite_is_found_in_any_block(bad, row, monkeypatch):
    monkeypatch.setattr(rounding, "_BLOCK", 16)
    base = torch.ones(12, 8)
    base[row, 3] = bad
    with pytest.raises(NonFiniteError, match="1 numbers"):
        rounded_sum(site(12, 8), base, [change(12, 8, 1, 0)])
    huge = LowRank(torch.full((12, 1), 300.0), torch.full((1, 8), 300.0))
    with pytest.raises(NonFiniteError, match="overflows"):
        rounded_sum(site(12, 8), torch.ones(12, 8, dtype=torch.float16), [huge])


@pytest.mark.parametrize("rows", [1, 100, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_is_hashed_while_it_is_filled(rows, dtype):
    """300 rows are hashed by a thread beside, 100 and 1 are not; the hash is that of the whole."""
    weight = torch.zeros(rows, 2048, dtype=dtype)
    hashing = Hashing(weight)
    for row in range(rows):
        weight[row] = row % 200 + 1
        hashing.filled(row + 1)
    assert hashing.sha256 == tensor_hash(weight)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_hashes_with_a_thread_of_its_own():
    weight = torch.ones(300, 1024)
    expected = tensor_hash(weight)

    def hashed() -> str:
        hashing = Hashing(weight)
        hashing.filled(300)
        return hashing.sha256

    assert hashed() == expected  # the parent's thread exists now
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which is what is tested
        child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if hashed() == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_hash_needs_no_thread_once_the_interpreter_ends():
    """A ledger may write in an exit handler, when no thread can be started any more."""
    script = """
import atexit, torch
from diffedit.rounding import Hashing, tensor_hash

@atexit.register
def last():
    weight = torch.ones(300, 1024)
    hashing = Hashing(weight)
    hashing.filled(150)
    hashing.filled(300)
    print(hashing.sha256 == tensor_hash(weight))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == "True"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_has_seven_digits_of_any_size(dtype):
    weight = (100 * torch.randn(31, 17, generator=torch.Generator().manual_seed(0))).to(dtype)
    digits = 1e-14 if dtype is torch.float64 else 1e-6
    for scale in (1.0, 1e-30, 1e30):
        scaled = (weight.double() * scale).to(dtype)
        if bool(torch.isfinite(scaled).all()):
            assert frobenius(scaled) == pytest.approx(float(np.linalg.norm(scaled.double().numpy())), rel=digits)
    weight[30, 16] = float("nan")
    assert frobenius(weight) != frobenius(weight)
    weight[30, 16] = float("inf")
    assert frobenius(weight) == float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numbers", [5, 64])
def test_bits_are_compared_and_not_numbers(dtype, numbers):
    kept = torch.randn(numbers, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept[0], kept[1] = 0.0, float("nan")
    assert same_bits(kept.clone(), kept)
    for at, value in ((0, -0.0), (numbers - 1, 3.0)):
        other = kept.clone()
        other[at] = value
        assert not same_bits(other, kept)
    assert not same_bits(kept.clone(), kept.to(torch.float64 if dtype is not torch.float64 else torch.float32))
    assert not same_bits(torch.stack([kept, kept], 1)[:, 0], kept)  # not contiguous: it cannot be told cheaply


def test_what_is_known_of_a_copy_is_right_and_computed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(rounding, "cast_hashes", lambda weight: calls.append(weight) or cast_hashes(weight))
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    known = Known(weight)
    assert not calls
    assert known.hashes == known.hashes == cast_hashes(weight) and len(calls) == 1
    assert known.norm == frobenius(weight)
