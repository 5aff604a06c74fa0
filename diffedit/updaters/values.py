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
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffedit.errors import ContradictionError, NonFiniteError, NoOpError, RequestError
from diffedit.interfaces import Activations, Backend
from diffedit.request import Request
from diffedit.site import EditSite, SubjectSpan, TokenRule
from diffedit.text import find

ValueKind = Literal["stream", "module"]


@dataclass(frozen=True)
class PairWeights:
    """How much each kind of token pair counts in the solve; 0 leaves it out.

    Attributes:
        subject: tokens that the location's rule selects.
        eos: the end-of-text token.
        padding: each padding position after it.
    """

    subject: float = 1.0
    eos: float = 0.0
    padding: float = 0.0


@dataclass(frozen=True, eq=False)
class KeyValues:
    """All pairs at one site, float64.

    Attributes:
        keys: [n, d_in].
        values: [n, d_out], wanted outputs without bias.
        current: [n, d_out], present outputs without bias: keys @ W^T.
        weights: [n].
        preserve: [m, d_in], keys whose outputs must stay.
        preserve_weights: [m], by the kind of token, as for the pairs.
        prompts: the source prompt of each pair.
    """

    keys: Tensor
    values: Tensor
    current: Tensor
    weights: Tensor
    preserve: Tensor
    preserve_weights: Tensor
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class _Pair:
    source: int
    target: int
    i: int
    j: int
    weight: float


def key_values(
    backend: Backend,
    requests: Sequence[Request],
    sites: Sequence[EditSite],
    rule: TokenRule,
    *,
    weights: PairWeights,
    kind: ValueKind,
    keep_bias: bool = False,
) -> dict[EditSite, KeyValues]:
    """Collect the pairs of all requests at each site, in two forward passes that stop there.

    Args:
        backend: the model.
        requests: each with a target.
        sites: sites of one component.
        rule: which tokens of the subject are paired.
        weights: how much each kind of pair counts.
        kind: see the module's text.
        keep_bias: leave the bias in the wanted values, as the released Diff-QuickFix does.

    Raises:
        NoOpError: the wanted values are the present ones.
        ContradictionError: the same key is asked for two different values.
        NonFiniteError: the model's activations are not finite.
    """
    prompts: list[str] = []
    spans: list[SubjectSpan] = []
    kept: list[int] = []
    held: set[str] = set()

    def add(prompt: str, phrase: str, start: int) -> int:
        starts = [a for a, _ in find(prompt, phrase)]
        if start not in starts:
            raise RequestError(
                "the subject is no whole word in its template", value=repr(prompt), hint='put spaces around "{}"'
            )
        spans.append(backend.span(prompt, phrase, starts.index(start)))
        prompts.append(prompt)
        return len(prompts) - 1

    couples: list[tuple[int, int]] = []
    for request in requests:
        if request.target is None:
            raise RequestError("the request has no target yet", value=repr(request.subject))
        targets = [add(prompt, request.target, at) for prompt, at in request.render(request.target)]
        for name in request.names:
            for (prompt, at), target in zip(request.render(name), targets, strict=True):
                couples.append((add(prompt, name, at), target))
        for phrase in request.preserve:
            for prompt, at in request.render(phrase):
                if prompt not in held:
                    held.add(prompt)
                    kept.append(add(prompt, phrase, at))

    seen = backend.capture(prompts, sites, padded=weights.padding > 0)
    length = seen.tokens.shape[1]
    pairs = [pair for s, t in couples for pair in _pairs(s, t, spans[s], spans[t], rule, weights, length)]
    if not pairs:
        raise RequestError(
            "no token pairs are left", cause="every pair weight is 0", hint="give the subject tokens a weight"
        )
    return {
        site: _at_site(backend, site, seen, pairs, _kept(kept, spans, rule, weights, length), prompts, kind, keep_bias)
        for site in sites
    }


def _pairs(
    s: int, t: int, source: SubjectSpan, target: SubjectSpan, rule: TokenRule, weights: PairWeights, length: int
) -> Iterator[_Pair]:
    """Token pairs of one couple of prompts: subject tokens from the end, then end-of-text, then padding by offset."""
    if weights.subject > 0:
        goal = target.positions(rule)
        for back, i in enumerate(reversed(source.positions(rule))):
            yield _Pair(s, t, i, goal[max(len(goal) - 1 - back, 0)], weights.subject)
    if weights.eos > 0 and rule is not TokenRule.EOS:
        yield _Pair(s, t, source.eos, target.eos, weights.eos)
    if weights.padding > 0:
        for step in range(1, length - source.eos):
            yield _Pair(s, t, source.eos + step, min(target.eos + step, length - 1), weights.padding)


def _kept(
    rows: Sequence[int], spans: Sequence[SubjectSpan], rule: TokenRule, weights: PairWeights, length: int
) -> list[tuple[int, int, float]]:
    """(prompt, position, weight) of every preserve key: each kind of token that is edited is also held still."""
    out: list[tuple[int, int, float]] = []
    for row in rows:
        span = spans[row]
        if weights.subject > 0:
            out += [(row, position, weights.subject) for position in span.positions(rule)]
        if weights.eos > 0 and rule is not TokenRule.EOS:
            out.append((row, span.eos, weights.eos))
        if weights.padding > 0:
            out += [(row, position, weights.padding) for position in range(span.eos + 1, length)]
    return out


def _at_site(
    backend: Backend,
    site: EditSite,
    seen: Activations,
    pairs: Sequence[_Pair],
    kept: Sequence[tuple[int, int, float]],
    prompts: Sequence[str],
    kind: ValueKind,
    keep_bias: bool,
) -> KeyValues:
    inputs, outputs, streams = (x[site].double() for x in (seen.inputs, seen.outputs, seen.streams))
    weight, bias = backend.weight(site).detach().double(), backend.bias(site)
    for what, value in (("the weight", weight), ("the layer's input", inputs), ("the layer's output", outputs)):
        if not bool(torch.isfinite(value.sum())):
            bad = int((~torch.isfinite(value)).sum())
            raise NonFiniteError(
                f"{what} of {site.name} is not finite",
                value=f"{bad} numbers",
                hint="reload the model; float16 may overflow",
            )
    rows = torch.tensor([(p.source, p.i, p.target, p.j) for p in pairs], device=inputs.device)
    s, i, t, j = rows.T
    keys, values = inputs[s, i], outputs[t, j]
    if bias is not None and not keep_bias:
        values = values - bias.detach().double()
    if kind == "stream":
        values = values + (streams[t, j] - streams[s, i])
    current = keys @ weight.T
    preserve = torch.stack([inputs[row, position] for row, position, _ in kept]) if kept else keys[:0]
    stillness = torch.tensor([weight for *_, weight in kept], dtype=torch.float64, device=inputs.device)
    scale = torch.tensor([p.weight for p in pairs], dtype=torch.float64, device=inputs.device)
    names = tuple(prompts[p.source] for p in pairs)
    result = KeyValues(keys, values, current, scale, preserve, stillness, names)
    _check_change(site, result)
    _check_contradiction(result)
    return result


def _check_change(site: EditSite, pairs: KeyValues) -> None:
    change = torch.linalg.vector_norm(pairs.values - pairs.current)
    if float(change) <= 1e-6 * float(torch.linalg.vector_norm(pairs.current)):
        raise NoOpError(
            f"the edit asks {site.name} for what it already does",
            value=repr(pairs.prompts[0]),
            cause="subject and target look the same to this layer",
            hint="choose another target",
        )


def _check_contradiction(pairs: KeyValues) -> None:
    """Equal keys with different wanted values: no solve can satisfy both, a silent average would satisfy neither."""
    unit = pairs.keys / torch.linalg.vector_norm(pairs.keys, dim=1, keepdim=True).clamp_min(1e-300)
    same = torch.triu(unit @ unit.T > 1 - 1e-12, diagonal=1).nonzero().tolist()
    for a, b in same:
        gap = torch.linalg.vector_norm(pairs.values[a] - pairs.values[b])
        if float(gap) > 1e-3 * float(torch.linalg.vector_norm(pairs.values[a])):
            raise ContradictionError(
                "two pairs ask the same key for different values",
                value=f"{pairs.prompts[a]!r} and {pairs.prompts[b]!r}",
                hint="remove one of the two subjects, or give both the same target",
            )
