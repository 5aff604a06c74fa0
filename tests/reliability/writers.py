"""Many processes save over one folder while others load it: whoever loads sees one save, whole.

    python -m tests.reliability.writers --saves 200 [--writers 8] [--readers 4]

Each writer saves an edit of its own again and again over the same path. Each reader loads the folder without pause. A
load is torn if it gives an edit that no writer saved, or one that lacks a part.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from diffedit.edit import Edit
from diffedit.errors import DiffEditError
from tests.reliability.samples import edits

MOST_WRITERS = 9


@dataclass
class Campaign:
    """What the processes saw.

    Attributes:
        saved: saves that came to their end.
        refused: saves that raised, by message; none should.
        loaded: loads that gave one of the saved edits, whole.
        torn: loads that gave anything else.
        failed: loads that raised, by message.
        seconds: duration of it all.
    """

    saved: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    loaded: int = 0
    torn: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


def run(root: Path, *, writers: int = 8, readers: int = 4, saves: int = 200) -> Campaign:
    """Let the processes go, wait for the writers, stop the readers, add up.

    Raises:
        AssertionError: a process died, or the folder that remains is none of the saved ones.
    """
    first, *others = edits(min(writers, MOST_WRITERS) + 1)
    path = first.save(root / "edit")
    whole = {edit.id: edit.files() for edit in (first, *others)}
    stop = root / "stop"
    begun = time.perf_counter()
    writing = [_fork(partial(_write, others[i % len(others)], path, saves)) for i in range(writers)]
    reading = [_fork(partial(_read, path, stop, whole)) for _ in range(readers)]
    report = Campaign()
    for part in map(_join, writing):
        report.saved += part["saved"]
        report.refused.update(part["refused"])
    stop.touch()
    for part in map(_join, reading):
        report.loaded += part["loaded"]
        report.torn.update(part["torn"])
        report.failed.update(part["failed"])
    report.seconds = time.perf_counter() - begun
    stop.unlink()
    left = {file.name: file.read_bytes() for file in path.iterdir()}
    if left not in whole.values() or os.listdir(root) != ["edit"]:
        raise AssertionError(f"in the end {root} holds {sorted(os.listdir(root))}, {path} holds {sorted(left)}")
    return report


def _write(edit: Edit, path: Path, saves: int) -> dict[str, Any]:
    refused: Counter[str] = Counter()
    saved = 0
    for _ in range(saves):
        try:
            edit.save(path, overwrite=True)
            saved += 1
        except DiffEditError as error:
            refused[str(error)] += 1
    return {"saved": saved, "refused": refused}


def _read(path: Path, stop: Path, whole: dict[str, dict[str, bytes]]) -> dict[str, Any]:
    torn: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    loaded = 0
    while not stop.exists():
        try:
            edit = Edit.load(path)
        except DiffEditError as error:
            failed[f"{type(error).__name__}: {error.case}"] += 1
            continue
        if edit.id not in whole:
            torn["an edit that nobody saved"] += 1
        elif edit.files() != whole[edit.id]:
            torn["an edit without all of its parts"] += 1
        else:
            loaded += 1
    return {"loaded": loaded, "torn": torn, "failed": failed}


def _fork(work: Callable[[], dict[str, Any]]) -> tuple[int, int]:
    """A process that runs `work` and sends its result through a pipe; it never returns into the caller's stack."""
    result, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(result)
            with os.fdopen(send, "w") as pipe:
                json.dump(work(), pipe)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(send)
    return pid, result


def _join(process: tuple[int, int]) -> dict[str, Any]:
    pid, descriptor = process
    with os.fdopen(descriptor) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise AssertionError(f"a process ended with status {status}")
    result: dict[str, Any] = json.loads(text)
    return result


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=200)
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--readers", type=int, default=4)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as root:
        report = run(Path(root), writers=options.writers, readers=options.readers, saves=options.saves)
    print(json.dumps(vars(report), indent=2))
    return 1 if report.torn or report.failed or report.refused else 0


if __name__ == "__main__":
    sys.exit(main())
