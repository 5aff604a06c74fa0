"""LocoGen: which cross-attention layers have to read the target's prompt for the picture to become the target's?

Source: Basu et al. 2024 (arXiv 2405.01008). Every layer but a window of `m` neighbouring cross-attention layers reads
the original prompt's embedding; the window reads the target prompt's. All windows of one size are tried, and the size
grows from 1 until the best window passes a threshold. Layers are counted in the order in which the UNet runs them; the
published code sorts their names by letters, which puts the middle block after the down blocks only by chance.

    share = (Phi(window) - Phi(original)) / (Phi(target) - Phi(original))

Phi is a measure against the *target's* run, so 1 means that the window alone does all of it, and a window of all layers
does so exactly. Differs from the paper: it scores pictures against the original concept (lower is better) or the new
fact (higher); the default here is the predicted noise, which needs no pictures. With the measure `image`, Phi is the
score against the target's prompt. Limits: only neighbouring layers; the best of many windows is picked by the runs that
measure it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from diffedit import registry
from diffedit.errors import NoCausalSiteError, RequestError
from diffedit.interfaces import Backend, Locator
from diffedit.intervention import CROSS_ATTN, UNET, Part, Runs, find_parts
from diffedit.locators.table import TraceTable, Unit
from diffedit.request import Request
from diffedit.site import Location, TokenRule
from diffedit.traceable import Measure, traceable


class LocoGen(Locator):
    """The smallest window of cross-attention layers that makes the target's picture.

    Attributes:
        threshold: share of the whole effect that a window must reach; higher finds wider windows.
        largest: widest window to try; default: all layers.
        measure: `denoising`, `image`, or that of a plugin.
        measure_settings: fields of the measure.
        seeds: starting latents per prompt; more narrow the intervals.
        prompts: at most so many of a request's templates are used.
        tokens: token positions that an edit at the window should pair.
        batch_size: runs computed together; default: as many as half of the free memory holds.
    """

    name = "locogen"
    reference = "Basu et al. 2024, arXiv 2405.01008, LocoGen"

    threshold: float = Field(default=0.5, gt=0, le=1)
    largest: int | None = Field(default=None, ge=1)
    measure: str = "denoising"
    measure_settings: dict[str, Any] = Field(default_factory=dict)
    seeds: int = Field(default=2, ge=1)
    prompts: int = Field(default=4, ge=1)
    tokens: TokenRule = TokenRule.LAST_SUBJECT
    batch_size: int | None = Field(default=None, ge=1)

    def locate(self, backend: Backend, requests: Sequence[Request]) -> Location:
        """The first window size whose best window passes the threshold.

        Raises:
            RequestError: a request has no target.
            NoCausalSiteError: subject and target look the same, or no window passes.
        """
        layers = find_parts(traceable(backend).parts(UNET), (CROSS_ATTN,))
        largest = min(len(layers), self.largest or len(layers))
        best = "none"
        for window in range(1, largest + 1):
            table = self.table(backend, requests, window)
            state = table.best_state()
            if state.share >= self.threshold:
                first = table.locate(self.name, self.reference)
                return Location(first.sites, self.tokens, self.name, self.reference, first.scores)
            best = f"{window} layers from {state.part.name}: {state.share:.0%}"
        raise NoCausalSiteError(
            f"no window of up to {largest} cross-attention layers does {self.threshold:.0%} of the change",
            value=f"best: {best}",
            hint="allow wider windows, or lower the threshold",
        )

    def table(self, backend: Backend, requests: Sequence[Request], window: int) -> TraceTable:
        """All windows of one size: `clean` is the target's run, `corrupted` the original's; too short ones are NaN."""
        measure: Measure = registry.configure("measures", self.measure, self.measure_settings)
        model = traceable(backend)
        layers = find_parts(model.parts(UNET), (CROSS_ATTN,))
        if not 1 <= window <= len(layers):
            raise RequestError("a window has at least one layer and at most all", value=window)
        size = self.batch_size or model.batch_limit()
        starts = range(len(layers) - window + 1)
        takes: tuple[tuple[Part, ...], ...] = ((), (), *(layers[i : i + window] for i in starts))
        rows: dict[Unit, list[float]] = {}
        for original, target, subject in self._pairs(requests):
            states = model.embed([target, original])
            embeddings = states[[0] + [1] * (len(takes) - 1)]
            for seed in range(requests[0].seed, requests[0].seed + self.seeds):
                runs = Runs(target, seed, embeddings, takes, take="embedding")
                rows[Unit(original, subject, seed)] = measure.measure(backend, runs, batch_size=size)
        units = tuple(sorted(rows))
        scores = np.array([rows[unit] for unit in units], dtype=np.float64)
        restored = np.full((len(units), len(layers), 1), math.nan)
        restored[:, : len(starts), 0] = scores[:, 2:]
        table = TraceTable(UNET, layers, ("whole",), units, scores[:, 0], scores[:, 1], restored, window)
        if not table.total_effect.positive or table.total_effect.mean < measure.least_total_effect:
            raise NoCausalSiteError(
                "subject and target look the same to the measure",
                value=f"total effect {table.total_effect}",
                hint="name a target that differs more, or use another measure",
            )
        return table

    def _pairs(self, requests: Sequence[Request]) -> list[tuple[str, str, str]]:
        """(original prompt, target prompt, subject), the same template in both."""
        found = []
        for request in requests:
            if request.target is None:
                raise RequestError("locogen needs a target", value=repr(request.subject), hint="name one")
            targets = [text for text, _ in request.render(request.target)]
            step = max(1, len(targets) / self.prompts)
            chosen = [int(i * step) for i in range(min(self.prompts, len(targets)))]
            for name in request.names:
                prompts = [text for text, _ in request.render(name)]
                found += [(prompts[i], targets[i], name) for i in chosen]
        return found
