"""Fuzzes the reader of edit files: typed errors or the very same bytes, within a second and in bounded memory.

    python -m tests.reliability.fuzz --cases 20000 [--seed 0] [--only NUMBER]

Case `n` of seed `s` depends on these two numbers only; a failure prints them.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from diffedit.io.files import EDIT_FILE
from tests.reliability import samples
from tests.reliability.mutations import Mutator
from tests.reliability.reader import SAME, edits, folder_outcome, outcome

WARM_UP = 200
MAX_SECONDS = 1.0
MAX_GROWTH = 256.0


@dataclass
class Campaign:
    """What a run of many cases showed.

    Attributes:
        cases: number of files given to the reader.
        outcomes: how many ended how.
        kinds: how many were broken at which layer.
        cpu_seconds: processor time of the whole run, making the cases included.
        slowest: processor time of the slowest case, in seconds.
        slowest_case: its number.
        growth: by how many MiB the peak of the resident memory rose after the first `WARM_UP` cases.
        peak: that peak in MiB; most of it is torch.
    """

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    cpu_seconds: float = 0.0
    slowest: float = 0.0
    slowest_case: int = 0
    growth: float = 0.0
    peak: float = 0.0


def run(cases: int, seed: int = 0) -> Campaign:
    """Run cases 0 to `cases` - 1 of a seed.

    Raises:
        AssertionError: a case crashed the reader, was accepted without a forger's hashes, was slow, or memory grew.
    """
    mutator = intact()
    originals = [*({EDIT_FILE: edit.data} for edit in mutator.edits), *mutator.folders]
    report = Campaign()
    start = time.process_time()
    warm = peak_memory()
    for number in range(cases):
        kind, files = make(mutator, seed, number)
        begun = time.process_time()
        try:
            result = judge(files)
        except Exception as error:
            raise AssertionError(f"case {number} of seed {seed} ({kind}): {type(error).__name__}: {error}") from error
        spent = time.process_time() - begun
        if result == SAME and kind not in ("forged", "false") and files not in originals:
            raise AssertionError(f"case {number} of seed {seed} ({kind}): a changed file was accepted")
        if spent > report.slowest:
            report.slowest, report.slowest_case = spent, number
        report.cases += 1
        report.outcomes[result] += 1
        report.kinds[kind] += 1
        if number == WARM_UP:
            warm = peak_memory()
    report.cpu_seconds = time.process_time() - start
    report.peak = peak_memory()
    report.growth = report.peak - warm
    if report.slowest > MAX_SECONDS:
        raise AssertionError(f"case {report.slowest_case} of seed {seed} took {report.slowest:.2f} s")
    if report.growth > MAX_GROWTH:
        raise AssertionError(f"memory grew by {report.growth:.0f} MiB")
    return report


def intact() -> Mutator:
    """What the cases are made from."""
    return Mutator(edits(), [edit.files() for edit in samples.edits(3)])


def make(mutator: Mutator, seed: int, number: int) -> tuple[str, dict[str, bytes]]:
    """The layer that is broken and the files of one case."""
    return mutator.case(Random(f"{seed}:{number}"))


def judge(files: Mapping[str, bytes]) -> str:
    """What the reader says; a single file is read from memory, several from a folder."""
    if len(files) == 1:
        return outcome(files[EDIT_FILE])
    with tempfile.TemporaryDirectory() as folder:
        return folder_outcome(Path(folder), files)


def peak_memory() -> float:
    """Peak resident memory of this process in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="print one case's bytes and outcome, and stop")
    options = parser.parse_args()
    if options.only is not None:
        kind, files = make(intact(), options.seed, options.only)
        print(kind, *files.items(), sep="\n")
        print(judge(files))
        return 0
    logging.disable(logging.WARNING)
    begun = time.perf_counter()
    report = run(options.cases, options.seed)
    print(json.dumps(vars(report) | {"wall_seconds": time.perf_counter() - begun}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
