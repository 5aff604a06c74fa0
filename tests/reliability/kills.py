"""Kills real processes in the middle of a save and looks at what they leave.

    python -m tests.reliability.kills --points 200 [--seed 0]

Half of the points are placed: before every call to the operating system that a save makes, and in the middle of every
write. The other half come after a random time of up to 100 ms, while a process saves one edit over another again and
again. After each: the old folder or the new one, whole, and nothing else once the next save has swept.

SIGKILL ends a process but not the operating system, whose caches survive: what a power cut would leave depends on the
order of the calls to fsync, which `tests/unit/io/test_folder.py` checks.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from random import Random

import pytest

from diffedit.edit import Edit
from diffedit.io.folder import write_folder
from tests.reliability.faults import Fault, Faults, kill, kill_halfway
from tests.reliability.samples import edits

MAX_DELAY = 0.1
LITTER = ".diffedit-"


@dataclass
class Campaign:
    """What the kills showed.

    Attributes:
        points: processes killed.
        placed: how many of them before which call, or in the middle of it.
        left: what was at the destination: "nothing", "old" or "new" ("new" is either edit for random points).
        littered: kills that left a temporary behind, all swept by the next save.
    """

    points: int = 0
    placed: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    littered: int = 0


def run(points: int, root: Path, seed: int = 0) -> Campaign:
    """Kill `points` processes, half of them at chosen calls, in folders below `root`.

    Raises:
        AssertionError: something else than the old or the new folder was there, or litter stayed.
    """
    old, new, other = edits(3)
    report = Campaign()
    rng = Random(seed)
    places = _places(old, new, root / "trace")
    chosen = [places[i % len(places)] for i in range(points // 2)]
    for number, (overwrite, at, fault, name) in enumerate(chosen):
        base = root / f"placed-{number}"
        base.mkdir()
        if overwrite:
            old.save(base / "edit")
        _killed_at(lambda base=base: new.save(base / "edit", overwrite=True), at, fault)
        before = _files(old) if overwrite else None
        _look(base, {"old" if overwrite else "nothing": before, "new": _files(new)}, other, report)
        report.placed[name] += 1
    for number in range(points - len(chosen)):
        base = root / f"random-{number}"
        base.mkdir()
        old.save(base / "edit")
        _killed_after(rng.random() * MAX_DELAY, base / "edit", old, new, encode=number % 2 == 0)
        _look(base, {"old": _files(old), "new": _files(new)}, other, report)
    return report


def _places(old: Edit, new: Edit, root: Path) -> list[tuple[bool, int, Fault, str]]:
    """Every place at which a save can be killed: (over an old edit, number of the call, how, its name).

    Each kind of place comes once before any comes twice, so that few points already reach all kinds.
    """
    kinds: dict[tuple[bool, str], list[tuple[bool, int, Fault, str]]] = {}
    for overwrite in (False, True):
        base = root / str(overwrite)
        base.mkdir(parents=True)
        if overwrite:
            old.save(base / "edit")
        with pytest.MonkeyPatch.context() as monkeypatch:
            faults = Faults(monkeypatch, 0, kill)
            new.save(base / "edit", overwrite=True)
        for at, name in enumerate(faults.log, 1):
            call = faults.describe(at)
            kinds.setdefault((overwrite, call), []).append((overwrite, at, kill, f"before {call}"))
            if name == "write":
                kinds.setdefault((overwrite, "in"), []).append((overwrite, at, kill_halfway, "in write"))
    turns = zip_longest(*kinds.values())
    return [place for turn in turns for place in turn if place is not None]


def _killed_at(save: Callable[[], object], at: int, fault: Fault) -> None:
    def work() -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            Faults(monkeypatch, at, fault)
            save()

    with _child(work) as pid:
        _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        raise AssertionError("the save ran to its end: the call to be killed at never came")


def _killed_after(delay: float, path: Path, old: Edit, new: Edit, *, encode: bool) -> None:
    """Kill a process that saves for ever; `encode` says whether it also makes the files anew each time."""
    files = [_files(old), _files(new)]

    def work() -> None:
        os.write(start, b"x")
        while True:
            for edit, content in zip((new, old), files[::-1], strict=True):
                if encode:
                    edit.save(path, overwrite=True)
                else:
                    write_folder(path, content, overwrite=True)

    ready, start = os.pipe()
    try:
        with _child(work) as pid:
            os.read(ready, 1)
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    finally:
        os.close(ready)
        os.close(start)


@contextmanager
def _child(work: Callable[[], None]) -> Iterator[int]:
    """A forked process that runs `work`; it never returns into the caller's stack."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    yield pid


def _look(base: Path, allowed: dict[str, dict[str, bytes] | None], other: Edit, report: Campaign) -> None:
    path = base / "edit"
    found = _listing(path) if path.exists() else None
    matching = [name for name, files in allowed.items() if files == found]
    if not matching:
        raise AssertionError(f"{path} holds neither of {sorted(allowed)}: {sorted(found or {})}")
    if found is not None and Edit.load(path).files() != found:
        raise AssertionError(f"{path} does not load as what it is")
    report.points += 1
    report.left[matching[0]] += 1
    report.littered += any(name.startswith(LITTER) for name in os.listdir(base))
    other.save(base / "other")
    other.save(path, overwrite=True)
    if sorted(os.listdir(base)) != ["edit", "other"] or _listing(path) != _files(other):
        raise AssertionError(f"after the next save {base} holds {sorted(os.listdir(base))}")


def _listing(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


_CONTENT: dict[str, dict[str, bytes]] = {}


def _files(edit: Edit) -> dict[str, bytes]:
    if edit.id not in _CONTENT:
        _CONTENT[edit.id] = dict(sorted(edit.files().items()))
    return _CONTENT[edit.id]


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as root:
        print(json.dumps(vars(run(options.points, Path(root), options.seed)), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
