"""Running the units of a trace: taken up where it stopped, and spread over the processes that accelerate started.

Each finished unit (one prompt, one seed) becomes a small JSON file in `<out>/units`, named by a hash of everything that
its numbers depend on: settings, weights, prompt, seed. A later run of the same trace reads what is there and computes
the rest; files of another trace or another model have other names and are left alone. The folder goes when the trace
is complete.

`accelerate launch -m diffedit trace ...` starts several processes; every process computes its share, and all of them
end with the same table, since a unit's numbers depend on nothing but the unit.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from diffedit.interfaces import Backend
from diffedit.intervention import Runs
from diffedit.io.folder import write_file
from diffedit.locators.causal_trace import CausalTracing
from diffedit.locators.table import Unit
from diffedit.locators.tracer import Row, Tracer
from diffedit.traceable import traceable
from diffedit.tracing.result import CausalTrace, finished, refuse_existing

UNITS = "units"
_BOOKKEEPING = ("batch_size", "effect", "edit_tokens", "least_total_effect", "seeds", "prompts", "sites")


def trace(
    backend: Backend,
    locator: CausalTracing,
    probes: Sequence[tuple[str, str]],
    *,
    seed: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CausalTrace:
    """Trace probes with a locator's settings.

    Args:
        backend: the model, without edits that should not be traced.
        locator: the settings.
        probes: (prompt, subject) pairs.
        seed: the first of the seeds.
        out: folder for the result, and until it is complete for the finished units, so that an interrupted trace can
            go on.
        overwrite: replace a finished trace in `out`.
        progress: called with (units done, units in all) by this process, of its own share.

    Raises:
        OutputExistsError: `out` holds a finished trace.
        DiffEditError: see `CausalTracing.tracer`; everything is checked before the first run.
    """
    folder = None if out is None else Path(out).expanduser()
    if folder is not None and not overwrite:
        refuse_existing(folder)
    tracer = locator.tracer(backend, probes, seed=seed)
    units = None if folder is None else folder / UNITS
    weights = traceable(backend).digest()
    key = _key(tracer, locator, weights)
    rows = _run_all(tracer, units, key, progress)
    table = locator.finish(tracer.table(rows))
    settings = {key: value for key, value in locator.model_dump(mode="json").items() if key != "batch_size"}
    origin = {
        "model": backend.model.source,
        "revision": backend.model.revision,
        "backend": backend.name,
        "fingerprints": backend.fingerprints(),
        "weights": weights,
        "noise_std": tracer.noise,
    }
    found = finished(table, locator.name, locator.reference, settings, origin)
    if folder is not None and units is not None and first_process():
        found.save(folder, overwrite=overwrite)
        _clean_up(units, [_path(units, key, unit) for unit in tracer.units])
    return found


def estimate_seconds(tracer: Tracer) -> float:
    """How long the trace will take, from one timed pass of a small batch; the judge of pictures is not counted."""
    total = tracer.evaluations()
    if not total:
        return 0.0
    unit = tracer.units[0]
    rows = max(1, min(4, tracer.batch_size))
    model = traceable(tracer.backend)
    states = model.embed([unit.prompt]).expand(rows, -1, -1)
    runs = Runs(unit.prompt, 0, states, tuple(() for _ in range(rows)))
    model.predict(runs, (0.5,), batch_size=rows)  # the first pass pays for what is set up once
    start = time.perf_counter()
    model.predict(runs, (0.5,), batch_size=rows)
    return (time.perf_counter() - start) / rows * total / processes()


def processes() -> int:
    """How many processes `accelerate launch` or torchrun started; 1 if neither did."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1") or 1))


def team() -> Any:
    """Accelerate's state of the processes that were started together; `None` for one alone."""
    if processes() == 1:
        return None
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def first_process() -> bool:
    """Whether this one reports the result."""
    return int(os.environ.get("RANK", "0") or 0) == 0


def _run_all(
    tracer: Tracer, folder: Path | None, key: str, progress: Callable[[int, int], None] | None
) -> dict[Unit, Row]:
    state = team()
    if state is None:
        return _share(tracer, tracer.units, folder, key, progress)
    from accelerate.utils import gather_object

    with state.split_between_processes(list(tracer.units)) as mine:
        own = _share(tracer, mine, folder, key, progress)
    return dict(gather_object(list(own.items())))


def _share(
    tracer: Tracer,
    units: Sequence[Unit],
    folder: Path | None,
    key: str,
    progress: Callable[[int, int], None] | None,
) -> dict[Unit, Row]:
    rows: dict[Unit, Row] = {}
    for done, unit in enumerate(units, start=1):
        path = None if folder is None else _path(folder, key, unit)
        row = _stored(path, tracer)
        if row is None:
            row = tracer.run(unit)
            if path is not None:
                write_file(path, json.dumps(row).encode(), overwrite=True)
        rows[unit] = row
        if progress is not None:
            progress(done, len(units))
    return rows


def _stored(path: Path | None, tracer: Tracer) -> Row | None:
    """A finished unit, or None if there is none or the file is not whole."""
    if path is None or not path.is_file():
        return None
    with suppress(ValueError, KeyError, TypeError, OSError):
        row: Row = json.loads(path.read_bytes())
        right = len(row["restored"]) == len(tracer.parts)
        right = right and all(len(cells) == len(tracer.columns) for cells in row["restored"])
        if right and isinstance(row["clean"], float) and isinstance(row["corrupted"], float):
            return row
    return None


def _key(tracer: Tracer, locator: CausalTracing, weights: str) -> str:
    settings: Mapping[str, Any] = locator.model_dump(mode="json")
    said = {name: value for name, value in settings.items() if name not in _BOOKKEEPING}
    parts = [said, tracer.columns, tracer.noise, weights, tracer.backend.model.source]
    return json.dumps(parts, sort_keys=True)


def _path(folder: Path, key: str, unit: Unit) -> Path:
    text = json.dumps([key, unit.prompt, unit.subject, unit.seed])
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _clean_up(folder: Path, paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # units of another trace are still in there
        folder.rmdir()
