"""From requests to numbers: keys, wanted values and weights at each edit site.

A pair (k, v*) says "where the layer now reads k, let it write v*". k is the layer's input at a token of the source
prompt ("a photo of a [dog]"); v* comes from the paired token of the target prompt ("a photo of a [cat]"), the bias
taken off, for the layer adds it by itself: the released Diff-QuickFix leaves it in and so adds it twice.

Two kinds of value:

    module   v* = y_t - b                            the paper's: the layer writes what it writes for the target
    stream   v* = y_t - b + (x_t - x_s)              ours: *after* the layer the residual stream is the target's

with y the layer's output and x the residual stream it is added to, at the target's (t) and the source's (s) token.
With `module` the source word's own embedding stays in the stream and later layers can still read it; with `stream`
everything after the edited layer sees the target's state at that token.

The layer is linear, so the residual y_t - b - W k_s is W (k_t - k_s): one product with the difference, in float32
(float64 for a float64 model) whatever the model's dtype. The smaller the difference, the smaller the rounding.

Where the backend's numbers allow it (`Backend.independent`) all requests are read together and multiplied some hundred
pairs at a time; elsewhere each by itself. Each is reduced by itself (`linalg.rows`). So an edit's pairs are the
same bits whether it was made alone or with others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffedit.delta import LowRank
from diffedit.errors import NonFiniteError, NoOpError
from diffedit.garbage import postponed
from diffedit.interfaces import Backend
from diffedit.linalg.product import product
from diffedit.linalg.rows import reduce_batch, reduce_rows
from diffedit.pairs import Held, Pairs, Wanted, check_contradictions
from diffedit.reading import Numbers, Rows
from diffedit.request import Request, edited_names
from diffedit.rounding import frobenius
from diffedit.site import EditSite, TokenRule
from diffedit.updaters.layers import edited
from diffedit.updaters.tokens import (
    Entry,
    Listed,
    PairWeights,
    group_of,
    held_entry,
    list_pairs,
    portions,
    wanted_entry,
)

ValueKind = Literal["stream", "module"]

_PAIRS = 512  # turned into numbers together: what they take stays in the processor's cache


@dataclass(frozen=True)
class Recipe:
    """How token pairs become numbers.

    Attributes:
        kind: see the module's text.
        tol: see `diffedit.linalg.rows.reduce_rows`.
        keep_bias: leave the bias in the wanted values, as the released Diff-QuickFix does.
        shares: which part of the residuals a site is to write; all of them if it is not named.
        before: changes of other sites under which the subject and preserved names are read; targets never are.
    """

    kind: ValueKind
    tol: float
    keep_bias: bool = False
    shares: Mapping[EditSite, float] = field(default_factory=dict)
    before: Mapping[EditSite, LowRank] = field(default_factory=dict)


@postponed()
def key_values(
    backend: Backend,
    requests: Sequence[Request],
    sites: Sequence[EditSite],
    rule: TokenRule,
    weights: Sequence[PairWeights],
    recipe: Recipe,
) -> dict[EditSite, Pairs]:
    """Collect the pairs of all requests at each site, running the model no further than to the sites.

    Args:
        backend: the model.
        requests: each with a target.
        sites: where.
        rule: which tokens of the subject are paired.
        weights: per request, how much each kind of pair counts; its preserve keys weigh the same by kind.
        recipe: how they become numbers.

    Raises:
        NoOpError: the wanted values of a request are the present ones.
        ContradictionError: the same key is asked for two different values.
        NonFiniteError: the model's weights or activations are not finite.
    """
    taken = edited_names(requests)
    asked: list[Entry] = []
    kept: dict[tuple[str, str], Entry] = {}
    for request, weight in zip(requests, weights, strict=True):
        group = group_of(request, weight)
        asked.append(wanted_entry(request, weight, group))
        for name in request.preserve:
            key = name.casefold(), group
            if key[0] not in taken and key not in kept:
                kept[key] = held_entry(request, name, weight, group)
    norms = {site: _norm(backend, site) for site in sites}
    wanted, shared = _collect(backend, asked, sites, rule, recipe, norms)
    held, _ = _collect(backend, list(kept.values()), sites, rule, recipe, norms)
    found = {}
    for site in sites:
        found[site] = Pairs(
            tuple(
                Wanted(keys, residuals, count, entry.group)
                for entry, (keys, residuals, count) in zip(asked, wanted[site], strict=True)
            ),
            tuple(
                Held(name, group, keys, count)
                for (_, group), entry, (keys, _, count) in zip(kept, kept.values(), held[site], strict=True)
                for name in [str(entry.held)]
            ),
            norms[site],
        )
        check_contradictions(found[site], [request.subject for request in requests], sorted(shared[site]))
    return found


_Numbers = tuple[Tensor, Tensor, int]  # keys [r, d_in], residuals [r, d_out], pairs that they stand for


def _collect(
    backend: Backend,
    entries: Sequence[Entry],
    sites: Sequence[EditSite],
    rule: TokenRule,
    recipe: Recipe,
    norms: dict[EditSite, float],
) -> tuple[dict[EditSite, list[_Numbers]], dict[EditSite, set[tuple[int, int]]]]:
    """The reduced rows of each entry, in order, and which entries have a key in common, to the bit.

    All entries are requests, or all preserved names. Prompts that are the same up to a token give the same key there;
    of several entries with one key, each is named beside the first.
    """
    out: dict[EditSite, dict[int, _Numbers]] = {site: {} for site in sites}
    owners: list[Numbers] = []
    marks: dict[EditSite, list[Numbers]] = {site: [] for site in sites}
    for portion in portions(backend, entries, sites):
        read = [entries[i] for i in portion]
        listed = list_pairs(backend, read, rule, sites[0])
        padded = read[0].weights.padding > 0
        with edited(backend, recipe.before):
            aims = rows = backend.read(listed.places, sites, padded=padded)
        if recipe.before and read[0].held is None:
            aims = backend.read(listed.places, sites, padded=padded)
        for which, part in listed.parts(_PAIRS):
            owners.append(np.repeat(portion[which], part.counts))
            for site in sites:
                keys, residuals = _differences(backend, site, read[which], part, (rows, aims), recipe, norms[site])
                reduced = _reduced(keys, residuals, read[which], part, recipe.tol, recipe.shares.get(site, 1.0))
                out[site].update(zip(portion[which], reduced, strict=True))
                if len(entries) > 1:
                    marks[site].append(_marks(keys))
    shared = {site: _shared(owners, found) if found else set() for site, found in marks.items()}
    return {site: [found[i] for i in range(len(entries))] for site, found in out.items()}, shared


def _shared(owner_parts: Sequence[Numbers], mark_parts: Sequence[Numbers]) -> set[tuple[int, int]]:
    """The owners of one mark as couples (smaller, larger) of the first of them and each other one."""
    owners, marks = np.concatenate(owner_parts), np.concatenate(mark_parts)
    order = np.argsort(marks, kind="stable")
    owners, marks = owners[order], marks[order]
    starts = np.flatnonzero(np.diff(marks, prepend=marks[:1] + 1))
    first = np.repeat(owners[starts], np.diff(starts, append=len(marks)))
    couples = np.stack([np.minimum(first, owners), np.maximum(first, owners)], 1)[first != owners]
    return {(i, j) for i, j in couples.tolist()}


def _marks(keys: Tensor) -> Numbers:
    """A number for each key, the same for the same bits; different keys hardly ever share one."""
    bits = keys.cpu().numpy()
    bits = bits.view(np.int64 if bits[0].nbytes % 8 == 0 else np.int32)
    found: Numbers = bits @ _mark_weights(bits.shape[1])  # beyond 64 bits it wraps around
    return found


@cache
def _mark_weights(width: int) -> Numbers:
    return np.random.default_rng(0).integers(-(2**62), 2**62, width) * 2 + 1


def _differences(
    backend: Backend,
    site: EditSite,
    entries: Sequence[Entry],
    listed: Listed,
    seen: tuple[Rows, Rows],
    recipe: Recipe,
    norm: float,
) -> tuple[Tensor, Tensor]:
    """Keys [n, d_in] and residuals [n, d_out] of all pairs (no columns for preserved names), weights not folded in.

    `seen` is what the sources are taken from and what the targets are taken from.
    """
    rows, aim_rows = seen
    s, t = listed.sources, listed.targets
    if entries[0].held is not None:
        keys, _ = rows.take(site, s)
        _check_finite("the layer's input", keys, site)
        return keys, keys[:, :0]
    if rows is aim_rows:  # at one go
        inputs, seen_streams = rows.take(site, np.concatenate([s, t]))
        (keys, aims), (streams, aim_streams) = inputs.chunk(2), seen_streams.chunk(2)
    else:
        (keys, streams), (aims, aim_streams) = rows.take(site, s), aim_rows.take(site, t)
    _check_finite("the layer's input", keys, site)
    with torch.no_grad(), torch.autocast(device_type=keys.device.type, enabled=False):
        residuals = product(aims - keys, backend.weight(site).detach().to(keys.dtype))
        bias = backend.bias(site)
        if bias is not None and recipe.keep_bias:
            residuals += bias.detach().to(keys.dtype)
        if recipe.kind == "stream":
            residuals += aim_streams - streams
    _check_finite("the layer's output", residuals, site)
    starts = np.cumsum((0, *listed.counts[:-1]))
    wanted, present = (
        np.add.reduceat(torch.linalg.vector_norm(x, dim=1).double().square().cpu().numpy(), starts) ** 0.5
        for x in (residuals, keys)
    )
    idle = wanted <= 1e-6 * norm * present / site.d_in**0.5  # of what the layer writes for such keys, typically
    if idle.any():
        request = entries[int(idle.argmax())].request
        raise NoOpError(
            f"the edit asks {site.name} for what it already does",
            value=repr(f"{request.subject} -> {request.target}"),
            cause="subject and target look the same to this layer",
            hint="choose another target",
        )
    return keys, residuals


def _reduced(
    keys: Tensor, residuals: Tensor, entries: Sequence[Entry], listed: Listed, tol: float, share: float
) -> list[_Numbers]:
    """Each entry's rows, as the edit keeps them, on the CPU; entries with equally many pairs go together."""
    out: dict[int, _Numbers] = {}
    counts = np.array(listed.counts)
    starts = np.cumsum(counts) - counts
    scale = listed.weights
    strength = share * np.array([entry.request.strength for entry in entries])
    sizes = sorted(set(listed.counts))
    for n in sizes:
        members = np.flatnonzero(counts == n)
        places = starts[members][:, None] + np.arange(n)
        at, weights = (torch.from_numpy(x).to(keys.device) for x in (places, scale[places]))
        # Entries of one size, the usual case, are all rows as they stand.
        chosen = [x[at] if len(sizes) > 1 else x.view(*at.shape, x.shape[1]) for x in (keys, residuals)]
        k, r = (x.double() for x in chosen)
        if not (strength == 1.0).all():  # a factor of 1 changes no bit
            r = r * torch.from_numpy(strength[members]).to(keys.device)[:, None, None]
        if n <= keys.shape[1] + residuals.shape[1]:
            rows, changes, ranks = reduce_batch(k, r, weights, tol)
        else:
            each = [reduce_rows(*one, tol) for one in zip(k, r, weights, strict=True)]
            rows, changes = torch.cat([a for a, _ in each]), torch.cat([b for _, b in each])
            ranks = tuple(len(a) for a, _ in each)
        # Rounded *before* the solve, so that what is kept gives the same change again.
        split = zip(*(torch.split(part.to("cpu", keys.dtype), list(ranks)) for part in (rows, changes)), strict=True)
        out.update((i, (a, b, n)) for i, (a, b) in zip(members.tolist(), split, strict=True))
    return [out[i] for i in range(len(entries))]


def _norm(backend: Backend, site: EditSite) -> float:
    """Frobenius norm of the weight, which is finite if every number of it is."""
    weight = backend.weight(site).detach()
    norm = frobenius(weight)
    if norm == float("inf") or norm != norm:
        _check_finite("the weight", weight, site)
    return norm


def _check_finite(what: str, value: Tensor, site: EditSite) -> None:
    if math.isfinite(float(value.sum())):  # a sum carries any NaN or infinity, and only rarely overflows by itself
        return
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise NonFiniteError(
            f"{what} of {site.name} is not finite",
            value=f"{bad} numbers",
            hint="reload the model; float16 may overflow",
        )
