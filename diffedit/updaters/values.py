"""From requests to numbers: keys, wanted values and weights at one edit site.

A pair (k, v*) says "where the layer now reads k, let it write v*". k is the layer's input at a token of the source
prompt ("a photo of a [dog]"); v* comes from the paired token of the target prompt ("a photo of a [cat]"), the bias
taken off, for the layer adds it by itself: the released Diff-QuickFix leaves it in and so adds it twice.

Two kinds of value:

    module   v* = y_t - b                            the paper's: the layer writes what it writes for the target
    stream   v* = y_t - b + (x_t - x_s)              ours: *after* the layer the residual stream is the target's

with y the layer's output and x the residual stream it is added to, at the target's (t) and the source's (s) token.
With `module` the source word's own embedding stays in the stream and later layers can still read it; with `stream`
everything after the edited layer sees the target's state at that token.

Every request and every preserved name runs in a batch of its own: floating-point results depend a little on what else
is in a batch, and an edit's pairs must be the same bits whether it was made alone or with others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffedit.errors import NonFiniteError, NoOpError, RequestError
from diffedit.interfaces import Activations, Backend
from diffedit.pairs import Held, Pairs, Wanted, check_contradictions, reduce_rows
from diffedit.request import Request
from diffedit.site import EditSite, SubjectSpan, TokenRule
from diffedit.text import find

ValueKind = Literal["stream", "module"]


@dataclass(frozen=True)
class PairWeights:
    """How much each kind of token pair counts in the solve; 0 leaves it out.

    Attributes:
        subject: tokens that the location's rule selects.
        eos: each token after the subject up to the end-of-text token, which is the only one if the subject ends the
            prompt.
        padding: each padding position after it.
    """

    subject: float = 1.0
    eos: float = 0.0
    padding: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """How token pairs become numbers.

    Attributes:
        kind: see the module's text.
        tol: see `diffedit.pairs.reduce_rows`.
        keep_bias: leave the bias in the wanted values, as the released Diff-QuickFix does.
    """

    kind: ValueKind
    tol: float
    keep_bias: bool = False


@dataclass(frozen=True)
class _Pair:
    source: int
    target: int
    i: int
    j: int
    weight: float


class _Batch:
    """Prompts that run together, and where their phrases stand in them."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.prompts: list[str] = []
        self._phrases: list[tuple[str, int]] = []

    def add(self, prompt: str, phrase: str, start: int) -> int:
        starts = [a for a, _ in find(prompt, phrase)]
        if start not in starts:
            raise RequestError(
                "the subject is no whole word in its template", value=repr(prompt), hint='put spaces around "{}"'
            )
        self.prompts.append(prompt)
        self._phrases.append((phrase, starts.index(start)))
        return len(self.prompts) - 1

    def run(self, sites: Sequence[EditSite], padded: bool) -> tuple[list[SubjectSpan], Activations]:
        spans = [
            self._backend.span(prompt, phrase, nth)
            for prompt, (phrase, nth) in zip(self.prompts, self._phrases, strict=True)
        ]
        return spans, self._backend.capture(self.prompts, sites, padded=padded)


def key_values(
    backend: Backend,
    requests: Sequence[Request],
    sites: Sequence[EditSite],
    rule: TokenRule,
    weights: Sequence[PairWeights],
    recipe: Recipe,
) -> dict[EditSite, Pairs]:
    """Collect the pairs of all requests at each site, in forward passes that stop there.

    Args:
        backend: the model.
        requests: each with a target.
        sites: sites of one component.
        rule: which tokens of the subject are paired.
        weights: per request, how much each kind of pair counts; its preserve keys weigh the same by kind.
        recipe: how they become numbers.

    Raises:
        NoOpError: the wanted values of a request are the present ones.
        ContradictionError: the same key is asked for two different values.
        NonFiniteError: the model's activations are not finite.
    """
    wanted: dict[EditSite, list[Wanted]] = {site: [] for site in sites}
    held: dict[EditSite, dict[tuple[str, str], Held]] = {site: {} for site in sites}
    edited = {name.casefold() for request in requests for name in request.names}
    for request, weight in zip(requests, weights, strict=True):
        group = _group(request, weight)
        for site, entry in _wanted(backend, request, sites, rule, weight, recipe, group).items():
            wanted[site].append(entry)
        for name in request.preserve:
            if name.casefold() not in edited and (name.casefold(), group) not in held[sites[0]]:
                for site, kept in _held(backend, request, name, sites, rule, weight, recipe, group).items():
                    held[site][kept.key] = kept
    found = {}
    for site in sites:
        norm = float(torch.linalg.vector_norm(backend.weight(site).detach(), dtype=torch.float64))
        found[site] = Pairs(tuple(wanted[site]), tuple(held[site].values()), norm)
        check_contradictions(found[site], [request.subject for request in requests])
    return found


def _group(request: Request, weights: PairWeights) -> str:
    """Sixteen hex digits that say which prompts stand around a name, and how its tokens weigh."""
    text = repr((request.templates, weights.subject, weights.eos, weights.padding))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _wanted(
    backend: Backend,
    request: Request,
    sites: Sequence[EditSite],
    rule: TokenRule,
    weights: PairWeights,
    recipe: Recipe,
    group: str,
) -> dict[EditSite, Wanted]:
    if request.target is None:
        raise RequestError("the request has no target yet", value=repr(request.subject))
    batch = _Batch(backend)
    targets = [batch.add(prompt, request.target, at) for prompt, at in request.render(request.target)]
    couples = [
        (batch.add(prompt, name, at), target)
        for name in request.names
        for (prompt, at), target in zip(request.render(name), targets, strict=True)
    ]
    spans, seen = batch.run(sites, weights.padding > 0)
    length = seen.tokens.shape[1]
    pairs = [pair for s, t in couples for pair in _pairs(s, t, spans[s], spans[t], rule, weights, length)]
    if not pairs:
        raise RequestError(
            "no token pairs are left", cause="every pair weight is 0", hint="give the subject tokens a weight"
        )
    return {site: _at_site(backend, site, seen, pairs, request, recipe, group) for site in sites}


def _pairs(
    s: int, t: int, source: SubjectSpan, target: SubjectSpan, rule: TokenRule, weights: PairWeights, length: int
) -> Iterator[_Pair]:
    """Token pairs of one couple of prompts: subject tokens from the end, then what follows them, by offset."""
    if weights.subject > 0:
        goal = target.positions(rule)
        for back, i in enumerate(reversed(source.positions(rule))):
            yield _Pair(s, t, i, goal[max(len(goal) - 1 - back, 0)], weights.subject)
    if weights.eos > 0 and rule is not TokenRule.EOS:
        for i, j in zip(range(source.stop, source.eos + 1), range(target.stop, target.eos + 1), strict=False):
            yield _Pair(s, t, i, j, weights.eos)
    if weights.padding > 0:
        for step in range(1, length - source.eos):
            yield _Pair(s, t, source.eos + step, min(target.eos + step, length - 1), weights.padding)


def _at_site(
    backend: Backend,
    site: EditSite,
    seen: Activations,
    pairs: Sequence[_Pair],
    request: Request,
    recipe: Recipe,
    group: str,
) -> Wanted:
    weight, bias = backend.weight(site).detach(), backend.bias(site)
    inputs, outputs, streams = (x[site].double() for x in (seen.inputs, seen.outputs, seen.streams))
    parts = {"the weight": weight, "the layer's input": inputs, "the layer's output": outputs}
    for what, value in parts.items():
        _check_finite(what, value, site)
    s, i, t, j = torch.tensor([(p.source, p.i, p.target, p.j) for p in pairs], device=inputs.device).T
    keys, values = inputs[s, i], outputs[t, j]
    if bias is not None and not recipe.keep_bias:
        values = values - bias.detach().double()
    if recipe.kind == "stream":
        values = values + (streams[t, j] - streams[s, i])
    current = keys @ weight.double().T
    residuals = values - current
    if float(torch.linalg.vector_norm(residuals)) <= 1e-6 * float(torch.linalg.vector_norm(current)):
        raise NoOpError(
            f"the edit asks {site.name} for what it already does",
            value=repr(f"{request.subject} -> {request.target}"),
            cause="subject and target look the same to this layer",
            hint="choose another target",
        )
    scale = torch.tensor([p.weight for p in pairs], dtype=torch.float64, device=inputs.device)
    keys, residuals = reduce_rows(keys, residuals * request.strength, scale, recipe.tol)
    return Wanted(_store(keys, weight), _store(residuals, weight), len(pairs), group)


def _held(
    backend: Backend,
    request: Request,
    name: str,
    sites: Sequence[EditSite],
    rule: TokenRule,
    weights: PairWeights,
    recipe: Recipe,
    group: str,
) -> dict[EditSite, Held]:
    """Keys of one preserved name: each kind of token that is edited is also held still."""
    batch = _Batch(backend)
    for prompt, at in dict(request.render(name)).items():
        batch.add(prompt, name, at)
    spans, seen = batch.run(sites, weights.padding > 0)
    kept: list[tuple[int, int, float]] = []
    for row, span in enumerate(spans):
        if weights.subject > 0:
            kept += [(row, position, weights.subject) for position in span.positions(rule)]
        if weights.eos > 0 and rule is not TokenRule.EOS:
            kept += [(row, position, weights.eos) for position in range(span.stop, span.eos + 1)]
        if weights.padding > 0:
            kept += [(row, position, weights.padding) for position in range(span.eos + 1, seen.tokens.shape[1])]
    found = {}
    for site in sites:
        inputs = seen.inputs[site].double()
        _check_finite("the layer's input", inputs, site)
        keys = torch.stack([inputs[row, position] for row, position, _ in kept])
        scale = torch.tensor([weight for *_, weight in kept], dtype=torch.float64, device=inputs.device)
        reduced, _ = reduce_rows(keys, keys[:, :0], scale, recipe.tol)
        found[site] = Held(name, group, _store(reduced, backend.weight(site)), len(kept))
    return found


def _store(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows as the edit keeps them, rounded *before* the solve, so that what is kept gives the same change again."""
    return rows.to(torch.float64 if weight.dtype is torch.float64 else torch.float32)


def _check_finite(what: str, value: Tensor, site: EditSite) -> None:
    if not bool(torch.isfinite(value.sum(dtype=torch.float64))):
        bad = int((~torch.isfinite(value)).sum())
        raise NonFiniteError(
            f"{what} of {site.name} is not finite",
            value=f"{bad} numbers",
            hint="reload the model; float16 may overflow",
        )
