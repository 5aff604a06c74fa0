"""kill -9 in the middle of a save: the old folder or the new one, and no litter once the next save is through."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.reliability import kills

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="fork and SIGKILL"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

CALLS = {
    "before open",
    "before write",
    "in write",
    "before fsync",
    "before rename",
    "before dirsync",
    "before exchange",
}


def test_some_kills(tmp_path: Path) -> None:
    report = kills.run(44, tmp_path)
    assert report.points == 44
    assert set(report.placed) >= CALLS  # the controls: every kind of call was reached,
    assert report.left["old"] and report.left["new"] and report.left["nothing"]  # every end is possible,
    assert report.littered > 10  # and the sweep had something to do


@pytest.mark.slow
def test_200_kills(tmp_path: Path) -> None:
    assert kills.run(200, tmp_path, seed=1).points == 200
