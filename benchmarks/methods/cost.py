"""What an edit costs: seconds beside `quickfix`'s in the same process, and peak memory.

Other work on the machine moves seconds; the ratio to a `quickfix` that ran right before each run, on the same concept
with the same target, moves less. Quick methods run three times, slow ones once; the median counts. Two kinds of
`quickfix` are the units: the default, which preserves all other concepts, and the bare one.

Memory is the most bytes of tensors that were live at once on top of the model (`diffedit.metering`), measured in a run
of its own, because counting takes time. A slow method takes fewer steps there, which does not lower the peak.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.methods.measure import World
from benchmarks.methods.plan import Cell, Record
from benchmarks.methods.table import METHODS, REFERENCE, describe
from diffedit.errors import DiffEditError
from diffedit.metering import peak_bytes

RUNS = 3
BARE = "quickfix-bare"


def cost(world: World, cell: Cell) -> Record:
    """The record of a cost cell."""
    method = METHODS[cell.method]
    record: Record = {"cell": asdict(cell), "label": describe(cell.setting), "refused": None}
    world.use(cell)
    _ = world.editor.pipeline  # UNet and VAE are read on demand: that is no part of an edit
    units: dict[str, list[float]] = {REFERENCE: [], BARE: []}
    seconds = []
    try:
        for run in range(1 if method.slow else RUNS):
            for name, taken in units.items():
                other = replace(cell, method=name, setting={})
                if not run:
                    _once(world, other, METHODS[name].build({}))
                taken.append(_once(world, other, METHODS[name].build({})))
            if not run and not method.slow:
                _once(world, cell, method.build(cell.setting))
            seconds.append(_once(world, cell, method.build(cell.setting)))
        brief = method.build({**cell.setting, **method.brief})
        peak = peak_bytes(lambda: _once(world, cell, brief))
    except DiffEditError as error:
        world.editor.revert()
        return record | {"refused": f"{type(error).__name__}: {error}"}
    own = statistics.median(seconds)
    return record | {
        "seconds": own,
        "runs": len(seconds),
        "ratio": own / statistics.median(units[REFERENCE]),
        "ratio_bare": own / statistics.median(units[BARE]),
        "quickfix_seconds": statistics.median(units[REFERENCE]),
        "quickfix_bare_seconds": statistics.median(units[BARE]),
        "peak_bytes": peak,
        "machine": {
            "cpu": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }


def runner(world: World) -> Callable[[Cell], Record]:
    """What makes the record of any cell."""
    return lambda cell: cost(world, cell) if cell.part == "cost" else world.run(cell)


def _once(world: World, cell: Cell, built: Any) -> float:
    """Seconds from the request to weights written."""
    updater, locator = built
    start = time.perf_counter()
    world.edit(cell, updater, locator)
    taken = time.perf_counter() - start
    world.editor.revert()
    return taken
