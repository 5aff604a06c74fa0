"""Thousands of broken and forged files against the reader; see `tests/reliability/mutations.py` for what they are."""

from __future__ import annotations

import pytest

from tests.reliability import fuzz, mutations
from tests.reliability.reader import SAME

ERRORS = {"MalformedArtifactError", "IntegrityError", "UnsafeFormatError", "UnsupportedVersionError", "NonFiniteError"}


def test_20000_cases() -> None:
    report = fuzz.run(20_000, seed=1)
    assert report.cases == 20_000 and set(report.kinds) == set(mutations.KINDS)
    assert set(report.outcomes) == ERRORS | {SAME}


@pytest.mark.slow
def test_200000_cases() -> None:
    assert fuzz.run(200_000, seed=2).cases == 200_000


def test_cases_are_reproducible() -> None:
    mutator = fuzz.intact()
    assert [fuzz.make(mutator, 0, i) for i in range(50)] == [fuzz.make(mutator, 0, i) for i in range(50)]
    assert fuzz.make(mutator, 0, 1) != fuzz.make(mutator, 1, 1)
