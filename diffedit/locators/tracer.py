"""From settings and probes to runs: what is computed for one prompt and one seed, and how the answers become a table.

A unit (one prompt, one seed) is independent of all others, so units can be spread over processes, stored, and taken up
again; their order changes nothing. Within a unit every restored run is computed once even if two columns mean the same
positions (a subject of one token: `last_subject` and `all_subject`), and all runs share the corrupted prefix of the
encoder, the starting latents and the empty prompt's embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffedit.errors import RequestError, UnsupportedModelError
from diffedit.interfaces import Backend
from diffedit.intervention import TEXT_ENCODER, Part, Patch, Runs, find_parts
from diffedit.locators.noise import noise_size, subject_noise
from diffedit.locators.states import WHOLE, column_names, column_positions, windows
from diffedit.locators.statistics import Array
from diffedit.locators.table import TraceTable, Unit
from diffedit.site import SubjectSpan
from diffedit.traceable import Measure, Traceable, traceable

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Tracer:
    """Everything that is fixed before the first run.

    Attributes:
        backend: the model.
        measure: what is read off a run.
        component: what is traced.
        parts: rows of the table.
        columns: columns of the table.
        spans: where the subject stands in each (prompt, subject).
        units: sorted.
        noise: standard deviation of the noise.
        window: parts of one kind that are restored together.
        both_branches: for a UNet, restore the unconditional branch too.
        batch_size: runs computed together.
    """

    backend: Backend
    measure: Measure
    component: str
    parts: tuple[Part, ...]
    columns: tuple[str, ...]
    spans: Mapping[tuple[str, str], SubjectSpan]
    units: tuple[Unit, ...]
    noise: float
    window: int
    both_branches: bool
    batch_size: int

    def run(self, unit: Unit) -> Row:
        """Scores of one unit, as plain JSON: `clean`, `corrupted` and `restored` [p][c] with null for no such run."""
        model = traceable(self.backend)
        span = self.spans[unit.prompt, unit.subject]
        width, _ = model.embedding_scale()
        noise = subject_noise(span, width, self.noise, unit.seed)
        runs, cells = self._text(model, unit, span, noise) if self._text_trace else self._unet(model, unit, span, noise)
        scores = self.measure.measure(self.backend, runs, batch_size=self.batch_size)
        restored = [[None if index is None else scores[index] for index in row] for row in cells]
        return {"clean": scores[0], "corrupted": scores[1], "restored": restored}

    def runs_per_unit(self) -> int:
        """Most runs that any unit needs; for estimates of time."""
        if not self._text_trace:
            return 2 + len(self.parts)
        places = {
            key: {column_positions(column, span, span.eos + 2) for column in self.columns} - {()}
            for key, span in self.spans.items()
        }
        return 2 + len(self.parts) * max(len(found) for found in places.values())

    def evaluations(self) -> int:
        """Rows of the denoiser that all units together need."""
        return len(self.units) * self.measure.evaluations(self.backend, self.runs_per_unit())

    def table(self, rows: Mapping[Unit, Row]) -> TraceTable:
        """All units' scores as one table."""
        shape = (len(self.units), len(self.parts), len(self.columns))
        values: Array = np.array(
            [
                [[math.nan if cell is None else cell for cell in row] for row in rows[unit]["restored"]]
                for unit in self.units
            ],
            dtype=np.float64,
        ).reshape(shape)
        return TraceTable(
            component=self.component,
            parts=self.parts,
            columns=self.columns,
            units=self.units,
            clean=np.array([rows[unit]["clean"] for unit in self.units], dtype=np.float64),
            corrupted=np.array([rows[unit]["corrupted"] for unit in self.units], dtype=np.float64),
            restored=values,
            window=self.window,
            least_total_effect=self.measure.least_total_effect,
        )

    def all(self, progress: Callable[[int, int], None] | None = None) -> TraceTable:
        """Run every unit here and now."""
        rows = {}
        for done, unit in enumerate(self.units, start=1):
            rows[unit] = self.run(unit)
            if progress is not None:
                progress(done, len(self.units))
        return self.table(rows)

    @property
    def _text_trace(self) -> bool:
        return self.component == TEXT_ENCODER

    def _text(self, model: Traceable, unit: Unit, span: SubjectSpan, noise: torch.Tensor) -> tuple[Runs, Any]:
        length = int(model.embed([unit.prompt]).shape[1])
        patches: dict[Patch, int] = {}
        cells: list[list[int | None]] = []
        for members in windows(self.parts, self.window):
            places = [column_positions(column, span, length) for column in self.columns]
            row = [patches.setdefault(Patch(members, place), len(patches) + 2) if place else None for place in places]
            cells.append(row)
        found = model.encode_runs(unit.prompt, noise, span.start, list(patches))
        none: tuple[tuple[Part, ...], ...] = tuple(() for _ in range(len(patches) + 2))
        return Runs(unit.prompt, unit.seed, found.states, none), cells

    def _unet(self, model: Traceable, unit: Unit, span: SubjectSpan, noise: torch.Tensor) -> tuple[Runs, Any]:
        states = model.encode_runs(unit.prompt, noise, span.start, []).states
        members = windows(self.parts, self.window)
        embeddings = torch.cat([states, states[1:2].expand(len(members), -1, -1)])
        runs = Runs(unit.prompt, unit.seed, embeddings, ((), (), *members), both_branches=self.both_branches)
        return runs, [[index] for index in range(2, 2 + len(members))]


def make_tracer(
    backend: Backend,
    measure: Measure,
    probes: Sequence[tuple[str, str]],
    seeds: Sequence[int],
    *,
    component: str,
    kinds: Sequence[str],
    tokens: Sequence[Any],
    noise: float,
    noise_std: float | None,
    window: int,
    both_branches: bool,
    batch_size: int | None,
) -> Tracer:
    """Check everything that can be checked before the first run.

    Args:
        backend: the model.
        measure: what is read off a run.
        probes: (prompt, subject) pairs.
        seeds: of the noise and the latents.
        component: what to trace.
        kinds: kinds of part; none means all but the embedding.
        tokens: columns, for a text encoder.
        noise: standard deviation of the noise in multiples of the embeddings'.
        noise_std: the same, absolute; wins.
        window: parts of one kind that are restored together.
        both_branches: for a UNet, restore the unconditional branch too.
        batch_size: runs computed together; default: as many as memory allows.

    Raises:
        SubjectNotFoundError: a prompt does not hold its subject.
        RequestError: no probes, no seeds.
        UnsupportedModelError: the model, component, kind or measure does not fit.
    """
    model = traceable(backend)
    if not probes or not seeds:
        raise RequestError("a trace needs prompts and seeds", value=f"{len(probes)} prompts, {len(seeds)} seeds")
    if component not in measure.components:
        raise UnsupportedModelError(
            f"the measure {measure.name!r} cannot judge a trace of {component!r}",
            cause=f"it judges {', '.join(measure.components)}",
            hint="use the measure 'denoising' or 'image'",
        )
    known = model.parts(component)
    have = tuple(dict.fromkeys(part.kind for part in known))
    missing = [kind for kind in kinds if kind not in have]
    if missing:
        raise UnsupportedModelError(
            f"{component} has no such kind of part", value=", ".join(missing), hint=f"Known: {', '.join(have)}"
        )
    parts = find_parts(known, kinds or tuple(kind for kind in have if kind != "embedding"))
    spans = {(prompt, subject): backend.span(prompt, subject) for prompt, subject in probes}
    spans = {key: spans[key] for key in sorted(spans)}
    text = component == TEXT_ENCODER
    _, std = model.embedding_scale()
    needs_denoiser = measure.evaluations(backend, 1) > 0
    return Tracer(
        backend=backend,
        measure=measure,
        component=component,
        parts=parts,
        columns=column_names(tokens, spans.values()) if text else (WHOLE,),
        spans=spans,
        units=tuple(sorted({Unit(*key, seed) for key in spans for seed in seeds})),
        noise=noise_size(noise, std, noise_std),
        window=window,
        both_branches=both_branches,
        batch_size=batch_size or (model.batch_limit() if needs_denoiser else 1),
    )
