"""Proves that the ways for many pairs (Gram matrices, blocked QR, whitened search) give what the plain ways give:
against the SVD, against numpy, against brute force over all pairs of subspaces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffedit.linalg import gram, solve
from diffedit.linalg.gram import CONDITION_GRAM, GRAM_FROM, gram_factors, tall_factors
from diffedit.linalg.overlap import sharing
from diffedit.linalg.rows import reduce_batch, reduce_rows
from diffedit.linalg.solve import ridge_factors, ridge_of_blocks
from tests.oracle.strategies import matrix, orthonormal

SHAPES = {
    "fewer rows than dimensions": (90, 50, 200),
    "few pairs, many preserved": (30, 300, 60),
    "more pairs than dimensions": (300, 40, 60),
    "as many pairs as dimensions": (130, 0, 130),
}


def problem(n: int, m: int, d: int, decades: float, seed: int = 0):
    """Keys [n, d], residuals [n, 20], preserve keys [m, d] of one spectrum."""
    rng = np.random.default_rng(seed)
    rows = matrix(rng, n + m, d, decades=decades, scale=10.0)
    return (torch.from_numpy(x) for x in (rows[:n], rng.standard_normal((n, 20)), rows[n:]))


def dense(found) -> torch.Tensor:
    return found.up @ found.down


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("n", "m", "d"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("decades", [0.5, 3.0])
def test_gram_matrices_give_what_the_svd_gives(n, m, d, decades, monkeypatch):
    keys, residuals, held = problem(n, m, d, decades)
    options = dict(lam=1e-3, preserve=held, preserve_weights=torch.full((m,), 0.3)) if m else dict(lam=1e-3)
    fast = ridge_factors(keys, residuals, **options)
    monkeypatch.setattr(solve, "GRAM_FROM", 10**9)
    plain = ridge_factors(keys, residuals, **options)
    assert plain.up.shape[1] == n and n + m >= GRAM_FROM
    assert gap(dense(fast), dense(plain)) <= 1e-9
    for name in ("condition", "residual", "preserve_drift"):
        assert getattr(fast, name) == pytest.approx(getattr(plain, name), rel=1e-5, abs=1e-9)
    assert fast.effective_rank == plain.effective_rank


def test_the_gram_way_was_taken_and_refuses_what_it_cannot_do(monkeypatch):
    """The control: without the limit on the condition, digits would be lost."""
    keys, residuals, held = problem(300, 0, 60, 6.0)
    lam = 100.0 * 1e-12
    assert gram_factors(keys, residuals, held, lam) is None
    exact = tall_factors(keys, residuals, held, lam, 1e-14)
    monkeypatch.setattr(gram, "CONDITION_GRAM", float("inf"))
    careless = gram_factors(keys, residuals, held, lam)
    monkeypatch.setattr(solve, "GRAM_FROM", 10**9)
    plain = ridge_factors(keys, residuals, lam=lam)
    assert gap(dense(exact), dense(plain)) <= 1e-8
    assert careless is None or gap(dense(careless), dense(plain)) > 1e-7
    assert exact.condition == pytest.approx(plain.condition, rel=1e-4) and exact.condition > CONDITION_GRAM


@pytest.mark.parametrize("m", [0, 50])
@pytest.mark.parametrize("exact", [False, True], ids=["random", "fitted exactly"])
def test_blocks_of_rows_give_what_the_svd_gives(m, exact, monkeypatch):
    """Float32 rows, as pairs are kept, in blocks of several sizes; residuals that a change fits to the last digit."""
    rows = problem(300, m, 60, 0.5)
    keys, residuals, held = (x.float() for x in rows)
    if exact:
        change = np.random.default_rng(1).standard_normal((20, 60)) / 8
        keys, residuals = torch.round(keys * 8) / 8, torch.round(keys * 8).double() @ torch.from_numpy(change).T / 8
    options = dict(lam=1e-3, preserve=0.3**0.5 * held.double()) if m else dict(lam=1e-3)
    monkeypatch.setattr(solve, "GRAM_FROM", 10**9)
    plain = ridge_factors(keys, residuals, **options)
    for size in (1, 77, 300):
        wanted = list(zip(torch.split(keys, size), torch.split(residuals, size), strict=True))
        kept = [0.3**0.5 * part.double() for part in torch.split(held, size) if m]
        found = ridge_of_blocks(lambda wanted=wanted: iter(wanted), lambda kept=kept: iter(kept), lam=1e-3)
        assert gap(dense(found), dense(plain)) <= 1e-9
        for name in ("condition", "residual", "preserve_drift"):
            assert getattr(found, name) == pytest.approx(getattr(plain, name), rel=1e-5, abs=1e-9)
        assert found.effective_rank == plain.effective_rank


def test_blocks_that_are_not_fit_are_left_to_the_plain_way():
    keys, residuals, _ = problem(300, 0, 60, 6.0)
    for k, r, lam in (
        (keys, residuals, 1e-10),  # too ill-conditioned
        (keys, residuals, 0.0),
        (0 * keys, residuals, 1.0),
        (keys, residuals * float("nan"), 1.0),
        (torch.full_like(keys, float("inf")), residuals, 1.0),
    ):
        assert ridge_of_blocks(lambda k=k, r=r: [(k, r)], lambda: [], lam=lam) is None


@pytest.mark.parametrize("lam", [0.0, 1e-6])
def test_blocked_qr_keeps_its_digits(lam, monkeypatch):
    monkeypatch.setattr(gram, "_BLOCK", 64)
    keys, residuals, held = problem(260, 30, 40, 4.0)
    found = ridge_factors(keys, residuals, lam=lam, preserve=held)
    monkeypatch.setattr(solve, "GRAM_FROM", 10**9)
    plain = ridge_factors(keys, residuals, lam=lam, preserve=held)
    assert gap(dense(found), dense(plain)) <= 1e-8


def test_an_estimated_condition_is_right_to_a_few_per_cent(monkeypatch):
    keys, residuals, held = problem(400, 0, 90, 2.0)
    exact = gram_factors(keys, residuals, held, 1e-3)
    monkeypatch.setattr(gram, "_EXACT", 0)
    guessed = gram_factors(keys, residuals, held, 1e-3)
    assert guessed.condition == pytest.approx(exact.condition, rel=0.05)
    assert torch.equal(guessed.up, exact.up) and guessed.rank == exact.rank == 90


@pytest.mark.parametrize("tol", [0.0, 0.05, 0.3])
def test_reduced_rows_keep_both_products(tol):
    """K^T S K and K^T S R, up to `tol` squared; a set gives the same bits alone and in a batch."""
    rng = np.random.default_rng(0)
    keys = torch.from_numpy(np.stack([matrix(rng, 6, 40, decades=3.0, scale=5.0) for _ in range(50)]))
    residuals, weights = (
        torch.from_numpy(rng.standard_normal((50, 6, 30))),
        torch.from_numpy(rng.uniform(0.1, 2, (50, 6))),
    )
    rows, changes, ranks = reduce_batch(keys, residuals, weights, tol)
    assert sum(ranks) == len(rows) == len(changes)
    assert (tol == 0.0) == (set(ranks) == {6}) or tol == 0.05
    for k, r, w, k2, r2 in zip(keys, residuals, weights, rows.split(ranks), changes.split(ranks), strict=True):
        one = reduce_rows(k, r, w, tol)
        assert torch.equal(one[0], k2) and torch.equal(one[1], r2)
        energy = float((w[:, None] * k * k).sum()) * 2
        assert float((k2.T @ k2 - k.T @ (w[:, None] * k)).norm()) <= 6 * tol**2 * energy + 1e-10 * energy


def test_many_more_rows_than_columns_reduce_too():
    rng = np.random.default_rng(1)
    keys, residuals, weights = (
        torch.from_numpy(x) for x in (rng.normal(size=(90, 8)), rng.normal(size=(90, 5)), np.ones(90))
    )
    rows, changes = reduce_rows(keys, residuals, weights, 1e-6)
    assert len(rows) == 13
    assert gap(rows.T @ rows, keys.T @ keys) <= 1e-10 and gap(rows.T @ changes, keys.T @ residuals) <= 1e-10


@pytest.mark.parametrize(("blocks", "d"), [(12, 64), (150, 64), (90, 768)])
def test_planted_shared_directions_are_all_found(blocks, d):
    """Among blocks that have a strong direction in common up to small differences, as keys of prompts have."""
    rng = np.random.default_rng(blocks + d)
    common = rng.standard_normal(d)
    parts = [rng.integers(1, 4) for _ in range(blocks)]
    rows = [10 * common + rng.standard_normal((r, d)) for r in parts]
    planted = [(0, 1), (2, blocks - 1), (5, 7)]
    for a, b in planted:
        mixed = rng.standard_normal(parts[a]) @ rows[a]
        rows[b] = np.vstack([mixed * 3.0, *rows[b][1:]])
    found = sharing(torch.from_numpy(np.vstack(rows)), parts)
    assert set(planted) <= set(found) and len(found) <= len(planted) + 2


@pytest.mark.parametrize("apart", [0.0, 1e-9, 1e-8, 1e-7, 1e-6, 2e-5])
@pytest.mark.parametrize(("blocks", "d"), [(2, 32), (40, 32), (40, 768)])
def test_what_differs_by_rounding_alone_is_shared(apart, blocks, d):
    """The same prompt read twice differs by the rounding of the model's arithmetic, which processors do differently."""
    rng = np.random.default_rng(4)
    rows = rng.standard_normal((blocks, d)) + 3.0 * rng.standard_normal(d)  # and all have much in common
    noise = rng.standard_normal(d)
    rows[-1] = rows[0] + apart * np.linalg.norm(rows[0]) * noise / np.linalg.norm(noise)
    found = sharing(torch.from_numpy(rows), [1] * blocks)
    assert (0, blocks - 1) in found
    assert len(found) <= blocks


def test_independent_blocks_share_nothing():
    rng = np.random.default_rng(3)
    assert sharing(torch.from_numpy(orthonormal(rng, 60, 30).T), [2] * 15) == []
