"""Edits as an algebra: composed, taken apart and scaled without a model, exactly.

An edit keeps what it was solved from (`Delta.pairs`). Composing stacks the pairs of all edits and solves once more,
which is the solve that `Editor.run` would have made of all their requests on the model: adding the changes would not
be, for each was solved without knowing what the other writes. Taking a request out is the same with fewer pairs.
Scaling multiplies the residuals, in which the solve is linear.

Two rules make the result independent of order and history: requests stand in the order of their canonical JSON, and
what one request edits no other request preserves.

Limits: an edit of several sites of one encoder is taken site by site, from the pairs that each site was solved from; a
joint run would read the later sites under slightly other changes of the earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from pydantic import ValidationError

from diffedit import registry
from diffedit.delta import Delta
from diffedit.errors import BaseMismatchError, NotComposableError, RequestError
from diffedit.io.files import delta_records
from diffedit.io.manifest import Manifest, canonical_json, diagnostics_dict
from diffedit.io.pairs import pairs_records
from diffedit.pairs import DISAGREE, Pairs, check_contradictions, check_exclusion, disagreement, main_keys
from diffedit.request import Request, edited_names, make_request
from diffedit.site import EditSite

Part = tuple[Manifest, Delta]


@dataclass(frozen=True)
class Conflict:
    """One way in which two edits get into each other's way.

    Attributes:
        kind: "same subject", "contradiction" (one key, two wanted values), "preserved" (one side edits what the other
            preserves) or "interference" (one side's change moves the other's keys).
        site: name of the edit site; empty where the requests alone show it.
        mine: subject of this edit.
        theirs: subject of the other edit.
        cosine: of the two requests' main keys, -1 to 1; 0 without pairs.
        interference: |D k| / |r|: how far the change of one side moves the other's keys, in units of what that one asks
            for; the larger of both directions.
    """

    kind: str
    site: str
    mine: str
    theirs: str
    cosine: float = 0.0
    interference: float = 0.0


def compose(parts: Sequence[Part]) -> Part:
    """The joint solve of all requests of several edits.

    Raises:
        RequestError: no edits, or a subject in two of them.
        BaseMismatchError: they were made for different models.
        NotComposableError: they have no common solve.
        ContradictionError: they ask one key for different values.
    """
    if not parts:
        raise RequestError("there is no edit to compose", value="[]", hint="give at least one")
    first = min((manifest for manifest, _ in parts), key=lambda manifest: manifest.edit_id)
    for manifest, delta in parts:
        _check_common(first, manifest)
        _pairs_of(manifest, delta)
    entries = [
        (request, reason, manifest, delta, i)
        for manifest, delta in parts
        for i, (request, reason) in enumerate(zip(manifest.requests, manifest.target_reasons, strict=True))
    ]
    entries.sort(key=lambda entry: canonical_json(entry[0].model_dump(mode="json")))
    subjects = [name.casefold() for request, *_ in entries for name in request.names]
    twice = sorted({name for name in subjects if subjects.count(name) > 1})
    if twice:
        raise RequestError("a subject is in two edits", value=", ".join(twice), hint="take it out of one: edit.without")
    requests = tuple(_release(request, subjects) for request, *_ in entries)
    pairs = {
        site: reduce(
            Pairs.__add__,
            (delta.pairs[site].select([i], [request.preserve], subjects) for request, _, _, delta, i in entries),
        )
        for site in parts[0][1].pairs
    }
    return _solved(first, requests, tuple(reason for _, reason, *_ in entries), pairs, [m.edit_id for m, _ in parts])


def without(part: Part, names: Sequence[str]) -> Part:
    """The same edit with some of its requests left out: the solve that would have been made without them.

    Raises:
        RequestError: the edit has no such subject, or nothing would be left.
        NotComposableError: the edit has no pairs, or its metric excludes what only they preserved.
    """
    manifest, delta = part
    gone = {name.casefold() for name in names}
    known = edited_names(manifest.requests)
    if not gone or not gone <= known:
        raise RequestError(
            "the edit has no such subject",
            value=", ".join(sorted(gone - known)) or "[]",
            hint=f"it has {sorted(known)}",
        )
    chosen = [i for i, r in enumerate(manifest.requests) if not gone & {name.casefold() for name in r.names}]
    if not chosen:
        raise RequestError("nothing would be left of the edit", value=", ".join(names), hint="revert it instead")
    requests = tuple(manifest.requests[i] for i in chosen)
    edited = [name for request in requests for name in request.names]
    preserve = [request.preserve for request in requests]
    before = _pairs_of(manifest, delta)
    pairs = {site: data.select(chosen, preserve, edited) for site, data in before.items()}
    for site, data in before.items() if manifest.updater.settings.get("exact") == "preserve" else ():
        check_exclusion(data, pairs[site])
    reasons = tuple(manifest.target_reasons[i] for i in chosen)
    return _solved(manifest, requests, reasons, pairs, [manifest.edit_id])


def scale(part: Part, factor: float) -> Part:
    """The same edit made stronger or weaker.

    Raises:
        RequestError: the factor is 0 or not finite.
    """
    manifest, delta = part
    requests = tuple(make_request(**r.model_dump() | {"strength": r.strength * factor}) for r in manifest.requests)
    pairs = {site: data.scale([factor] * len(requests)) for site, data in delta.pairs.items()}
    changed = Delta((delta * factor).factors, {}, pairs)
    relative = {record.site: record.relative_norm * abs(factor) for record in manifest.sites}
    return _described(manifest, requests, manifest.target_reasons, changed, relative, [manifest.edit_id])


def conflicts(mine: Part, theirs: Part, threshold: float) -> tuple[Conflict, ...]:
    """What the two edits would do to each other in one model, worst first.

    Args:
        mine: one edit.
        theirs: the other, made for the same base.
        threshold: least interference that is reported.

    Raises:
        BaseMismatchError: they were made for different models.
    """
    _check_base(mine[0], theirs[0])
    found = []
    for a in mine[0].requests:
        for b in theirs[0].requests:
            if _names(a) & _names(b):
                found.append(Conflict("same subject", "", a.subject, b.subject))
            elif _names(a) & _lower(b.preserve) or _names(b) & _lower(a.preserve):
                found.append(Conflict("preserved", "", a.subject, b.subject))
    for site in sorted(set(mine[1].pairs) & set(theirs[1].pairs)):
        found += _at_site(site, mine, theirs, threshold)
    order = ("contradiction", "same subject", "interference", "preserved")
    return tuple(sorted(found, key=lambda c: (order.index(c.kind), -c.interference, c.mine, c.theirs, c.site)))


def _at_site(site: EditSite, mine: Part, theirs: Part, threshold: float) -> list[Conflict]:
    ours, others = mine[1].pairs[site].wanted, theirs[1].pairs[site].wanted
    cosine = main_keys(ours) @ main_keys(others).T
    changes = [part[1].factors[site] for part in (mine, theirs)]
    found = []
    for i, a in enumerate(ours):
        for j, b in enumerate(others):
            moved = []
            for change, entry in ((changes[1], a), (changes[0], b)):
                shift = (entry.keys.double() @ change.down.double().T) @ change.up.double().T
                asked = torch.linalg.vector_norm(entry.residuals.double())
                moved.append(float(torch.linalg.vector_norm(shift) / asked) if asked > 0 else 0.0)
            clash = disagreement(a, b) > DISAGREE
            if clash or max(moved) >= threshold:
                kind = "contradiction" if clash else "interference"
                names = mine[0].requests[i].subject, theirs[0].requests[j].subject
                found.append(Conflict(kind, site.name, *names, float(cosine[i, j]), max(moved)))
    return found


def _solved(
    like: Manifest,
    requests: tuple[Request, ...],
    reasons: tuple[str, ...],
    pairs: Mapping[EditSite, Pairs],
    parents: Sequence[str],
) -> Part:
    for data in pairs.values():
        check_contradictions(data, [request.subject for request in requests])
    try:
        updater = registry.get("updaters", like.updater.name).model_validate(like.updater.settings)
    except ValidationError as error:
        raise NotComposableError(
            f"the updater {like.updater.name} does not know the edit's settings",
            value=str(like.updater.settings)[:120],
            cause="it was made by another version of the updater",
            hint="run the requests together on the model: editor.run(requests)",
        ) from error
    delta = updater.solve_pairs(pairs)
    relative = {site: change.norm() / pairs[site].weight_norm for site, change in delta}
    return _described(like, requests, reasons, delta, relative, parents)


def _described(
    like: Manifest,
    requests: tuple[Request, ...],
    reasons: tuple[str, ...],
    delta: Delta,
    relative: Mapping[EditSite, float],
    parents: Sequence[str],
) -> Part:
    """The manifest of a change that no model has seen yet."""
    sites = tuple(
        record.model_copy(
            update={
                "rank": delta.factors[record.site].rank,
                "relative_norm": relative[record.site],
                "result_sha256": None,
                "achieved": None,
                "diagnostics": diagnostics_dict(delta.diagnostics.get(record.site)),
            }
        )
        for record in like.sites
    )
    manifest = like.model_copy(
        update={
            "requests": requests,
            "target_reasons": reasons,
            "sites": sites,
            "tensors": delta_records(delta),
            "pairs": pairs_records(delta.pairs),
            "parents": tuple(sorted(set(parents))),
        }
    ).with_id()
    return manifest, delta


def _check_common(one: Manifest, other: Manifest) -> None:
    _check_base(one, other)
    different = [
        what
        for what, a, b in (
            ("sites", [s.site for s in one.sites], [s.site for s in other.sites]),
            ("token rule", one.tokens, other.tokens),
            ("updater", one.updater.name, other.updater.name),
            ("settings", one.updater.settings, other.updater.settings),
        )
        if a != b
    ]
    if different:
        raise NotComposableError(
            "the edits have no common solve",
            value=f"{one.edit_id[:12]} and {other.edit_id[:12]} differ in {', '.join(different)}",
            hint="apply both to one model, or run their requests together with one updater",
        )


def _check_base(one: Manifest, other: Manifest) -> None:
    if one.base.fingerprints != other.base.fingerprints:
        raise BaseMismatchError(
            "the edits were made for different models", value=f"{one.base.source!r} and {other.base.source!r}"
        )
    theirs = {record.site: record.base_sha256 for record in other.sites}
    for record in one.sites:
        if record.site in theirs and record.base_sha256 != theirs[record.site]:
            raise BaseMismatchError(
                f"the edits were made for different weights at {record.site.name}",
                value=f"{one.base.source!r} and {other.base.source!r}",
                hint="make both on the same model in the same dtype",
            )


def _pairs_of(manifest: Manifest, delta: Delta) -> Mapping[EditSite, Pairs]:
    if not delta.pairs:
        raise NotComposableError(
            "the edit does not hold the pairs that it was solved from",
            value=manifest.edit_id[:12],
            cause=f"the updater {manifest.updater.name} keeps none, or pairs.safetensors is not beside the edit",
            hint="run the requests together on the model: editor.run(requests)",
        )
    return delta.pairs


def _release(request: Request, subjects: Sequence[str]) -> Request:
    """The request without preserving what is being edited."""
    edited = set(subjects)
    kept = tuple(name for name in request.preserve if name.casefold() not in edited)
    return request if kept == request.preserve else request.model_copy(update={"preserve": kept})


def _names(request: Request) -> set[str]:
    return _lower(request.names)


def _lower(names: Sequence[str]) -> set[str]:
    return {name.casefold() for name in names}
