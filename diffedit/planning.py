"""A `Plan` from a small part of the work: done once, measured, thrown away, and extrapolated.

One subject is solved, four, sixteen, ..., with a like share of the preserved names, until that took `BUDGET` seconds or
is half of the whole: constants differ by orders of magnitude between machines, models and methods, so they are measured
here. How they grow is in `growth`. A request of a few subjects is its own part. Nothing is written to the model.

Ranks and rows of independent subjects add up until the rank reaches that of the weight; sizes of files follow, since
an edit's files are its factors, its pairs, and text. What trains instead of solving cannot be tried in part: for such
an updater the plan has no estimates and says so.
"""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from diffedit.delta import Delta
from diffedit.edit import Edit
from diffedit.errors import RequestError
from diffedit.growth import Part, Peaks, count_couples, count_held, count_prompts, expected, grown, stored_pairs
from diffedit.interfaces import Backend, Locator, Updater
from diffedit.io.pairs import PAIRS_FILE
from diffedit.ledger import Ledger
from diffedit.metering import TensorMeter, seconds
from diffedit.plan import Plan, PlannedSite
from diffedit.preparing import Prepared, prepare
from diffedit.provenance import describe
from diffedit.request import Request
from diffedit.targets import Completer
from diffedit.updaters.values import key_values

_T = TypeVar("_T")

BUDGET = 0.3
_ENOUGH = 1.2  # seconds after which two parts have to do
_HEADER = 8  # bytes of a safetensors file before its header
_LINE = 80  # bytes of the card's line about a subject


def make_plan(
    backend: Backend,
    ledger: Ledger,
    completer: Completer,
    requests: Sequence[Request],
    updater: Updater,
    locator: Locator,
) -> Plan:
    """What an edit would be and cost; leaves the model as it is.

    Args:
        backend: the model.
        ledger: its ledger.
        completer: its completer; candidates for targets that it encodes are kept for the edit.
        requests: targets may be missing.
        updater: the method.
        locator: what chooses the sites; it must not need to measure for that.

    Raises:
        RequestError: the locator measures.
        DiffEditError: what making the edit would raise, as far as the parts show it.
    """
    if "measure" in type(locator).model_fields:
        raise RequestError(
            "the sites are not known before they are measured",
            value=f"locator {locator.name}",
            hint="plan with the locator fixed; diffedit trace says beforehand how long measuring takes",
        )
    with ledger.unedited():
        start = time.perf_counter()
        ready = prepare(backend, completer, requests, updater, locator)
        choosing = time.perf_counter() - start if any(request.target is None for request in requests) else 0.0
        solves = type(updater).solve_pairs is not Updater.solve_pairs
        parts = _try_parts(backend, ledger, ready) if solves else []
    return _plan(backend, ready, parts, round(choosing, 6))


def _try_parts(backend: Backend, ledger: Ledger, ready: Prepared) -> list[Part]:
    whole = count_prompts(ready.requests)
    units = max(len(ready.requests), max(len(request.preserve) for request in ready.requests))
    parts: list[Part] = []
    spent, size = 0.0, 1
    while True:
        chosen = part_of(ready.requests, size / units, least=2 ** len(parts))
        if not parts:
            _once(backend, ledger, ready, chosen)  # the first time pays for what is set up once
        if not parts or count_prompts(chosen) > parts[-1].prompts:
            parts.append(_measured(backend, ledger, ready, chosen))
            spent += parts[-1].seconds
        prompts = parts[-1].prompts
        enough = len(parts) > 2 and (spent > BUDGET or 2 * prompts >= whole)
        if prompts >= whole or enough or (len(parts) > 1 and spent > _ENOUGH):
            return parts
        size = min(4 * size, units)


def _measured(backend: Backend, ledger: Ledger, ready: Prepared, requests: tuple[Request, ...]) -> Part:
    took = seconds(lambda: _once(backend, ledger, ready, requests))
    with TensorMeter(apart=inspect.unwrap(key_values).__code__) as meter:
        delta = ready.updater.solve(backend, requests, ready.location)
        solving, meter.peak = meter.peak, meter.live
        edit = _finish(backend, ledger, ready, requests, delta)
    peaks = Peaks(meter.peak_apart, solving, meter.peak)
    return Part(requests, count_prompts(requests), took, peaks, edit)


def _once(backend: Backend, ledger: Ledger, ready: Prepared, requests: Sequence[Request]) -> Edit:
    """Everything that an edit does, but for the write."""
    return _finish(backend, ledger, ready, requests, ready.updater.solve(backend, requests, ready.location))


def _finish(backend: Backend, ledger: Ledger, ready: Prepared, requests: Sequence[Request], delta: Delta) -> Edit:
    """What follows the solve; the write is two copies of the weight, made here of its result."""
    trial = ledger.trial(delta)
    part = replace(ready, requests=tuple(requests), reasons=ready.reasons[: len(requests)])
    manifest = describe(backend, ledger, part, delta, trial)
    copies = [tried.weight.clone() for tried in trial.values()]  # the base is kept
    for tried, copy in zip(trial.values(), copies, strict=True):
        copy.copy_(tried.weight)
    return Edit(manifest, delta)


def part_of(requests: Sequence[Request], share: float, least: int = 1) -> tuple[Request, ...]:
    """An even selection of the requests, each with an even selection of its preserved names.

    Args:
        requests: the whole.
        share: of the requests and of the names of each.
        least: so many requests at least, as far as there are; and one name at least.
    """
    chosen = _even(requests, max(share, least / len(requests)))
    return tuple(request.model_copy(update={"preserve": _even(request.preserve, share)}) for request in chosen)


def _even(items: Sequence[_T], share: float) -> tuple[_T, ...]:
    count = min(len(items), max(1, math.ceil(share * len(items) - 1e-9)))
    return tuple(items[i * len(items) // count] for i in range(count)) if items else ()


def _plan(backend: Backend, ready: Prepared, parts: Sequence[Part], choosing: float) -> Plan:
    requests, location = ready.requests, ready.location
    prompts = count_prompts(requests)
    last = parts[-1] if parts else None
    share = count_couples(requests) / count_couples(last.requests) if last else 1.0
    exact = last is not None and last.prompts == prompts
    sites, counts = [], []
    for site in location.sites:
        change = last.edit.delta.factors.get(site) if last else None
        said = last.edit.delta.diagnostics.get(site) if last else None
        seen = getattr(said, "pairs", None)
        count = None if seen is None else round(seen * share)
        counts.append(count)
        most = min(site.d_in, site.d_out, count if exact and count is not None else site.d_in)
        ranks = [part.edit.delta.factors[site].rank for part in parts if site in part.edit.delta.factors]
        rank = None if change is None else min(most, round(grown(parts, ranks, share)))
        fields = {"name": site.name, "layer": site.layer, "role": site.role, "d_out": site.d_out, "d_in": site.d_in}
        sites.append(PlannedSite(**fields, rank=rank, rank_bound=most))
    width = min((site.d_in for site in location.sites), default=1)
    took, memory = expected(parts, requests, width, ready.updater.in_blocks) if parts else (None, None)
    notes = [] if parts else [f"the updater {ready.updater.name} does not solve: what it costs is not known beforehand"]
    return Plan(
        requests=requests,
        target_reasons=ready.reasons,
        base=backend.model.source,
        backend=backend.name,
        updater=ready.updater.name,
        locator=ready.locator.name,
        tokens=location.tokens,
        sites=tuple(sites),
        prompts=prompts,
        pairs=None if None in counts else sum(count or 0 for count in counts),
        files=_files(last, requests, sites, share) if last else {},
        seconds=took,
        choosing_seconds=choosing,
        memory=memory,
        sampled=last.prompts if last else 0,
        notes=(*notes, *ready.notes),
    )


def _files(part: Part, requests: Sequence[Request], sites: Sequence[PlannedSite], share: float) -> dict[str, int]:
    """Bytes of each file: numbers grow with ranks and rows, text with what it lists."""
    delta = part.edit.delta
    made = sum((site.d_in + site.d_out) * change.rank for site, change in delta)
    expected = sum((site.d_in + site.d_out) * (site.rank or 0) for site in sites)
    before, after = (sum(len(request.model_dump_json()) for request in group) for group in (part.requests, requests))
    held = count_held(requests) / max(1, count_held(part.requests))
    out = {}
    for name, data in part.edit.files().items():
        if not name.endswith(".safetensors"):
            more = len(requests) - len(part.requests) if name.endswith(".md") else 0
            out[name] = len(data) + _LINE * more
            continue
        header = int.from_bytes(data[:_HEADER], "little")
        numbers = len(data) - _HEADER - header
        if name == PAIRS_FILE:
            header = round(
                header * (len(requests) + count_held(requests)) / (len(part.requests) + count_held(part.requests))
            )
            numbers = stored_pairs(part.edit, share, held)
        else:
            extra = after - before if _lists_requests(data[_HEADER : _HEADER + header]) else 0
            header, numbers = header + extra, round(numbers * expected / made) if made else numbers
        out[name] = _HEADER + header + numbers
    return out


def _lists_requests(header: bytes) -> bool:
    """Whether a file's header carries the manifest, and with it every request."""
    try:
        metadata = json.loads(header).get("__metadata__", {})
    except ValueError:
        return False
    return any('"templates"' in value for value in metadata.values() if isinstance(value, str))
