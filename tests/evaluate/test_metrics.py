"""Shares and distances against definitions written out a second time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from diffedit.evaluate.metrics import clip_kept, complement, margin, mmd, paired_mmd, rate


def unit(rng, n, d):
    rows = rng.normal(size=(n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def kernel(a, b):
    return math.exp(-float(((a - b) ** 2).sum()) / 200)


def test_rates_are_the_textbook_intervals():
    found = rate(9, 10)
    assert (
        found.share == 0.9
        and found.low == pytest.approx(0.5550, abs=1e-4)
        and found.high == pytest.approx(0.9975, abs=1e-4)
    )
    none = rate(0, 300)
    assert none.low == 0 and none.high == pytest.approx(1 - 0.025 ** (1 / 300))
    assert rate(5, 5).high == 1 and rate(5, 5).low == pytest.approx(0.025 ** (1 / 5))


def test_no_trials_say_nothing():
    found = rate(0, 0)
    assert found.share is None and (found.low, found.high) == (0.0, 1.0)


@pytest.mark.parametrize("n", [1, 7, 30])
def test_the_interval_covers_the_truth_often_enough(n):
    spans = [(found.low, found.high) for found in (rate(k, n) for k in range(n + 1))]
    for p in np.linspace(0.01, 0.99, 25):
        covered = sum(binom.pmf(k, n, p) for k, (low, high) in enumerate(spans) if low <= p <= high)
        assert covered >= 0.95 - 1e-12


@given(st.integers(0, 40), st.integers(0, 40))
@settings(derandomize=True, max_examples=40, deadline=None)
def test_complements_mirror(hits, misses):
    found, other = rate(hits, hits + misses), complement(rate(hits, hits + misses))
    assert other.hits == misses
    assert other.low == pytest.approx(1 - found.high, abs=1e-9) and other.high == pytest.approx(1 - found.low, abs=1e-9)


def test_the_paired_distance_is_its_definition():
    rng = np.random.default_rng(1)
    x, y = unit(rng, 6, 5), unit(rng, 6, 5)
    terms = [
        kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i])
        for i in range(6)
        for j in range(6)
        if i != j
    ]
    value, (low, high) = paired_mmd(x, y)
    assert value == pytest.approx(1000 * np.mean(terms), abs=1e-9)
    assert low < value < high


def test_two_orthogonal_moves_by_hand():
    """Both pictures go from one axis to another: k is 1 among equals and exp(-2/200) across."""
    before, after = np.eye(3)[[0, 0]], np.eye(3)[[1, 1]]
    assert paired_mmd(before, after)[0] == pytest.approx(1000 * (2 - 2 * math.exp(-0.01)))


def test_unchanged_pictures_have_no_distance():
    x = unit(np.random.default_rng(2), 9, 16)
    value, (low, high) = paired_mmd(x, x.copy())
    assert max(abs(value), abs(low), abs(high)) < 1e-9


def test_the_distance_does_not_grow_by_chance():
    """Unbiased: independent noise before and after averages out to nothing, where the plain formula would not."""
    rng = np.random.default_rng(3)
    values = [paired_mmd(unit(rng, 8, 12), unit(rng, 8, 12), resamples=2)[0] for _ in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(300)
    x, y = unit(rng, 8, 12), unit(rng, 8, 12)
    plain = np.mean([[kernel(a, b) for b in x] for a in x]) + np.mean([[kernel(a, b) for b in y] for a in y])
    plain -= 2 * np.mean([[kernel(a, b) for b in y] for a in x])
    assert 1000 * plain > 5 * abs(np.mean(values))


def test_a_common_shift_is_seen_and_its_interval_leaves_zero_out():
    rng = np.random.default_rng(4)
    x = unit(rng, 30, 8)
    y = x + 0.8 * np.eye(8)[0]
    value, (low, high) = paired_mmd(x, y / np.linalg.norm(y, axis=1, keepdims=True))
    assert 0 < low < value < high
    assert paired_mmd(x, y)[1] == paired_mmd(x, y)[1], "the draws are fixed"


def test_the_unpaired_distance_is_its_definition():
    rng = np.random.default_rng(5)
    x, y = unit(rng, 4, 5), unit(rng, 6, 5)
    own = [np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)]
    cross = np.mean([kernel(a, b) for a in x for b in y])
    assert mmd(x, y) == pytest.approx(1000 * (own[0] + own[1] - 2 * cross), abs=1e-9)


def test_the_clip_score_kept_is_a_ratio_of_positive_parts():
    value, (low, high) = clip_kept(np.array([0.4, 0.2, -0.1]), np.array([0.3, 0.3, -0.4]))
    assert value == pytest.approx(1.0)
    assert low == pytest.approx(0.75) and high == pytest.approx(1.5)
    assert clip_kept(np.array([0.5, 0.5]), np.array([0.25, 0.25])) == (0.5, (0.5, 0.5))


def test_the_margin_compares_with_other_prompts_alone():
    cosines = np.array([[0.9, 0.9, 0.1], [0.8, 0.8, 0.3], [0.2, 0.2, 0.7]])
    assert margin(cosines, ["a", "a", "b"]) == pytest.approx((0.9 + 0.8 + 0.7) / 3 - (0.1 + 0.3 + 0.2 + 0.2) / 4)
    assert margin(cosines[:2, :2], ["a", "a"]) is None
