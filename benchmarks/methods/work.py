"""Who does which cell: any number of processes take cells from one folder, and any of them may be killed.

    cells/<key>.json     the record of a finished cell, written whole or not at all
    claims/<key>.lock    held (`flock`) by the process that is working on the cell

The kernel lets go of a lock when its process ends, however it ends: there are no stale claims to guess at. A lock says
nothing about the work; whether it is done is asked again once the lock is held. Limits: POSIX, and a file system with
working locks.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.methods.plan import Cell, Record
from diffedit.io.folder import write_file

CELLS, CLAIMS = "cells", "claims"


class Folder:
    """The folder of a run.

    Args:
        path: made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in (CELLS, CLAIMS):
            (path / name).mkdir(parents=True, exist_ok=True)
        self._records: dict[str, Record] = {}

    def records(self) -> dict[str, Record]:
        """Every finished cell's record, by key; files are read once."""
        for file in sorted((self.path / CELLS).glob("*.json")):
            if file.stem not in self._records:
                self._records[file.stem] = json.loads(file.read_bytes())
        return self._records

    def finished(self, cell: Cell) -> bool:
        """Whether the cell's record is there."""
        return self._file(cell).is_file()

    def finish(self, cell: Cell, record: Record) -> None:
        """Write the record of a cell."""
        data = json.dumps(record, indent=1, allow_nan=False, sort_keys=True) + "\n"
        write_file(self._file(cell), data.encode(), overwrite=True)

    @contextmanager
    def claim(self, cell: Cell) -> Iterator[bool]:
        """Whether the block has the cell for itself, and it is not finished yet; never waits."""
        handle = os.open(self.path / CLAIMS / f"{cell.key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield not self.finished(cell)
        finally:
            os.close(handle)

    def _file(self, cell: Cell) -> Path:
        return self.path / CELLS / f"{cell.key}.json"


def work(
    folder: Folder,
    plan: Callable[[dict[str, Record]], Sequence[Cell]],
    run: Callable[[Cell], Record],
    *,
    told: Callable[[Cell, float, int], None] = lambda cell, seconds, left: None,
    stop: Callable[[], bool] = lambda: False,
    wait: float = 1.0,
) -> list[tuple[Cell, Exception]]:
    """Do every cell that is not done, until nothing is left that this process can do.

    Args:
        folder: of the run.
        plan: the cells that are known, given the records so far; asked again after each cell.
        run: makes the record of a cell.
        told: called with a cell that this process finished, its seconds, and how many are left.
        stop: asked before each cell.
        wait: seconds between two looks at cells that others are working on.

    Returns:
        The cells that raised, and what; they are left for another run.
    """
    failed: dict[str, tuple[Cell, Exception]] = {}
    while not stop():
        left = [cell for cell in plan(folder.records()) if not folder.finished(cell) and cell.key not in failed]
        if not left:
            break
        for cell in left:
            with folder.claim(cell) as mine:
                if not mine:
                    continue
                start = time.monotonic()
                try:
                    record = run(cell)
                except Exception as error:  # one cell that cannot be made must not cost the rest of the night
                    failed[cell.key] = cell, error
                    break
                folder.finish(cell, record)
                told(cell, time.monotonic() - start, len(left) - 1)
                break
        else:  # the others hold what is left, and may yet die
            time.sleep(wait)
    return list(failed.values())


def read_published(path: Path) -> list[dict[str, Any]]:
    """The records of a published JSON file; none if there is no such file."""
    found: list[dict[str, Any]] = json.loads(path.read_bytes())["records"] if path.is_file() else []
    return found
