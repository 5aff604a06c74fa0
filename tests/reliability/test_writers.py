"""Eight writers and four readers of one folder: nobody ever gets parts of two saves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.reliability import writers

pytestmark = [
    pytest.mark.skipif(
        os.name != "posix" or not sys.platform.startswith("linux"), reason="fork, and the one-step swap of folders"
    ),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def check(report: writers.Campaign, saves: int) -> None:
    assert not report.torn and not report.failed and not report.refused, report
    assert report.saved == saves and report.loaded > saves // 20  # the control: readers were at work meanwhile


def test_8_writers_and_4_readers(tmp_path: Path) -> None:
    check(writers.run(tmp_path, saves=12), 8 * 12)


@pytest.mark.slow
def test_8_writers_of_200_saves_and_4_readers(tmp_path: Path) -> None:
    check(writers.run(tmp_path, saves=200), 8 * 200)
