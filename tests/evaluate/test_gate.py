"""Requirements: what is not proven is not met."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffedit.errors import RequestError
from diffedit.evaluate.findings import QUESTIONS
from diffedit.evaluate.gate import NAMES, Requirement, judge
from diffedit.evaluate.metrics import rate
from diffedit.evaluate.records import Evaluation, Finding, Part, Settings


def evaluation(**fields):
    """One with a single finding."""
    said = {"name": "efficacy", "question": "?", "better": "higher", "interval": "Clopper-Pearson", **fields}
    return Evaluation(
        edit_id="e", concepts=(), model="m", weights=("a", "b"), scorer="s", scorer_digest="d",
        settings=Settings(), findings=(Finding(**said),), pictures=(), versions={},
    )  # fmt: skip


def verdict(text, basis="point", **fields):
    return judge(evaluation(**fields), [Requirement.parse(text)], basis)[0]


@pytest.mark.parametrize(
    "text", ["efficacy", "efficacy>0.9", "efficacy=>0.9", "efficacy>=", "efficacy>=x", "efficacy>=nan", ">=1"]
)
def test_requirements_that_cannot_be_read(text):
    with pytest.raises(RequestError, match="NAME>=NUMBER"):
        Requirement.parse(text)


def test_unknown_names_get_a_suggestion():
    with pytest.raises(RequestError, match="specificity_near"):
        Requirement.parse("specificty_near>=1")


def test_every_finding_can_be_required():
    assert set(NAMES) == set(QUESTIONS)


def test_the_value_or_the_unfavourable_bound():
    numbers = {"value": 0.95, "low": 0.88, "high": 0.99, "n": 50}
    assert verdict("efficacy>=0.9", **numbers).met
    strict = verdict("efficacy>=0.9", "bound", **numbers)
    assert not strict.met and strict.judged == 0.88 and "lower end" in strict.reason
    assert verdict("efficacy<=0.96", **numbers).met
    assert verdict("efficacy<=0.96", "bound", **numbers).judged == 0.99


def test_a_refused_number_is_a_missed_requirement():
    missed = verdict("efficacy>=0", refused="the detector sees nothing")
    assert not missed.met and missed.judged is None and "sees nothing" in missed.reason


def test_a_concept_that_was_not_judged_fails_the_requirement():
    parts = tuple(
        Part(name=name, kind="k", before=rate(hits, 4), after=rate(0, 4), kept=rate(0, hits), refused=why)
        for name, hits, why in (("dog", 4, None), ("cat", 0, "blind"))
    )
    missed = verdict("efficacy>=0.9", value=1.0, low=0.5, high=1.0, n=4, parts=parts)
    assert not missed.met and "cat" in missed.reason and "blind" in missed.reason
    assert verdict("efficacy>=0.9", value=1.0, low=0.5, high=1.0, n=4, parts=parts[:1]).met


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["point", "bound"]))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_worse_never_turns_a_miss_into_a_pass(value, worse, bound, basis):
    worse, value = sorted((worse, value))
    outcomes = [verdict(f"efficacy>={bound}", basis, value=v, low=v / 2, high=1.0, n=9).met for v in (worse, value)]
    assert outcomes[0] <= outcomes[1]
