"""The numbers of the benchmark: counted right, refused where nothing was seen, honest where all concepts agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.methods.pool import harmonic, pooled
from diffedit.evaluate.metrics import rate


def row(group, name, n, before, kept, kind="prompts"):
    return {"group": group, "name": name, "kind": kind, "n": n, "before": before, "after": kept, "kept": kept}


def record(*rows, **more):
    return {"refused": None, "rows": list(rows), **more}


def test_efficacy_is_the_share_of_recognised_pictures_that_are_gone():
    found = pooled("efficacy", [record(row("efficacy", "fox", 10, 9, 3)), record(row("efficacy", "bus", 10, 10, 0))])
    assert found.value == pytest.approx(16 / 19)
    assert (found.n, found.concepts) == (19, 2)


def test_a_subject_that_the_unedited_model_cannot_draw_is_left_out_and_named():
    found = pooled("efficacy", [record(row("efficacy", "fox", 10, 6, 0)), record(row("efficacy", "bus", 10, 10, 5))])
    assert found.value == 0.5
    assert found.left_out == ("fox (recognised before in 6 of 10)",)
    alone = pooled("efficacy", [record(row("efficacy", "fox", 10, 6, 0))])
    assert alone.value is None
    assert alone.refused
    assert alone.left_out


def test_a_kind_of_prompt_is_judged_over_all_concepts():
    plurals = [
        record(row("generality", name, 3, 1, 0, "other names"), row("generality", name, 3, 2, 1)) for name in "ab"
    ]
    found = pooled("generality", plurals)
    assert found.left_out == ("other names (recognised before in 2 of 6)", "prompts (recognised before in 4 of 6)")
    assert found.value is None
    better = pooled("generality", [*plurals, record(row("generality", "c", 6, 6, 0))])
    assert better.value == pytest.approx(8 / 10)  # 4 of 6 and 6 of 6: 10 of 12 recognised, 2 of them left


def test_specificity_counts_what_stays():
    found = pooled("specificity_near", [record(row("near", "cat", 4, 4, 3), row("near", "dog", 4, 3, 3))])
    assert found.value == pytest.approx(6 / 7)


def test_the_interval_knows_that_pictures_of_one_concept_are_alike():
    alike = [record(row("efficacy", f"c{i}", 20, 20, 20 * (i % 2))) for i in range(10)]
    mixed = [record(row("efficacy", f"c{i}", 20, 20, 10)) for i in range(10)]
    wide, narrow = pooled("efficacy", alike), pooled("efficacy", mixed)
    assert wide.value == narrow.value == 0.5
    exact = rate(100, 200)
    assert (narrow.low, narrow.high) == (exact.low, exact.high)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_where_all_agree_the_interval_is_not_a_point():
    found = pooled("efficacy", [record(row("efficacy", f"c{i}", 6, 6, 0)) for i in range(20)])
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(rate(120, 120).low)


def test_in_one_edit_of_many_concepts_the_concepts_are_resampled():
    one = record(*[row("efficacy", f"c{i}", 10, 10, 10 * (i % 2)) for i in range(10)])
    found = pooled("efficacy", [one])
    assert found.concepts == 10
    assert found.high - found.low > rate(50, 100).high - rate(50, 100).low


def test_refused_edits_count_for_nothing_and_all_refused_is_no_number():
    bad = {"refused": "NoCausalSiteError: none", "cell": {}}
    assert pooled("efficacy", [bad, record(row("efficacy", "fox", 5, 5, 0))]).value == 1.0
    assert pooled("efficacy", [bad]).refused == "NoCausalSiteError: none"
    assert pooled("efficacy", []).refused == "not measured"
    assert pooled("fidelity_mmd", [record(fidelity_mmd=None)]).value is None


def test_means_and_targets():
    records = [record(fidelity_mmd=value, becomes={"hits": hits, "n": 5}) for value, hits in ((1.0, 5), (3.0, 0))]
    found = pooled("fidelity_mmd", records)
    assert (found.value, found.low, found.high) == (2.0, 1.0, 3.0)
    assert pooled("becomes_target", records).value == 0.5
    assert pooled("becomes_target", [record(becomes=None)]).value is None


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1)), min_size=1, max_size=12))
def test_intervals_hold_their_value_and_the_exact_interval(counts):
    records = [record(row("far", f"c{i}", n, n, round(n * share))) for i, (n, share) in enumerate(counts)]
    found = pooled("specificity_far", records, resamples=200)
    n = sum(n for n, _ in counts)
    kept = sum(r["rows"][0]["kept"] for r in records)
    exact = rate(kept, n)
    assert found.value == kept / n
    assert 0 <= found.low <= exact.low <= found.value <= exact.high <= found.high <= 1
    assert pooled("specificity_far", records[::-1], resamples=0).low == exact.low


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_harmonic_mean_lies_between_the_least_and_the_mean(values):
    found = harmonic(values)
    assert min(values) - 1e-9 <= found <= np.mean(values) + 1e-9
    assert harmonic([*values, 0.0]) == 0.0
