"""From requests to numbers where the image model reads the text: states of tokens, and what they should look like.

Every key and value projection of the UNet's cross-attention reads the same input: the text encoder's final states h.
So an edit of all of them has one set of keys, and what a layer should write for a token is what it writes for the
token of the target prompt that this one is paired with:

    k = h_s,    v* = W h_t,    R = v* - W k = (h_t - h_s) W^T

with s a token of the source prompt ("a photo of a [dog]") and t its partner in the target prompt. Collecting needs no
weight of the edited layers, only h: one run of the text encoder per request and one per preserved name.

Two ways of pairing tokens:

    subject   the tokens that the location's rule selects, from the end of the subject (UCE, LocoEdit)
    every     all positions, padding included; the words of the template with themselves, a subject that is part of the
              target ("rose" -> "blue rose") token by token, any other from its end, later positions by offset (TIME)

Every request and every preserved name runs in a batch of its own, so that an edit's numbers are the same bits whether
it was made alone or with others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffedit.errors import NonFiniteError, NoOpError, RequestError
from diffedit.interfaces import Backend
from diffedit.linalg.rows import reduce_rows
from diffedit.request import Request
from diffedit.site import EditSite, SubjectSpan, TokenRule

Pairing = Literal["subject", "every"]


@dataclass(frozen=True, eq=False)
class States:
    """One request in the space that the layers read.

    Attributes:
        keys: [r, d], weights folded in.
        shifts: [r, d], the target's states minus the keys, weights and strength folded in.
        count: token pairs that the rows stand for.
        group: sixteen hex digits of the prompts and the pairing; see `diffedit.pairs.Held`.
    """

    keys: Tensor
    shifts: Tensor
    count: int
    group: str


@dataclass(frozen=True)
class Reading:
    """How requests are read.

    Attributes:
        rule: which tokens of the subject carry it, for the pairing `subject`.
        pairing: see the module's text.
        weight: of each pair; preserved keys are not weighted here.
        tol: see `diffedit.linalg.rows.reduce_rows`.
    """

    rule: TokenRule
    pairing: Pairing
    weight: float
    tol: float

    def group(self, request: Request) -> str:
        """What makes two requests hold the same keys for the same name."""
        text = repr((request.templates, self.pairing))
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def request_states(backend: Backend, site: EditSite, request: Request, how: Reading) -> States:
    """Keys and shifts of one request.

    Args:
        backend: the model.
        site: any of the layers; all of them read the same states.
        request: with a target.
        how: which tokens to pair, and how much they count.

    Raises:
        RequestError: no target, or the weight is 0.
        NoOpError: the text encoder says the same for subject and target.
        NonFiniteError: the states are not finite.
    """
    if request.target is None:
        raise RequestError("the request has no target yet", value=repr(request.subject))
    if how.weight == 0:
        raise RequestError("no token pairs are left", cause="their weight is 0", hint="raise erase_scale")
    goals = request.render(request.target)
    sources = [prompt for name in request.names for prompt in request.render(name)]
    names = [name for name in request.names for _ in goals]
    spans = backend.spans([(prompt, name, at) for (prompt, at), name in zip(sources, names, strict=True)])
    ends = backend.spans([(prompt, request.target, at) for prompt, at in goals])
    padded = how.pairing == "every"
    seen = backend.capture([prompt for prompt, _ in (*sources, *goals)], [site], padded=padded)
    states = _states(seen.inputs[site], site)
    rows = []
    for s, source in enumerate(spans):
        t = s % len(goals)
        ids = seen.tokens[s].tolist(), seen.tokens[len(sources) + t].tolist()
        rows += [(s, i, len(sources) + t, j) for i, j in _couples(source, ends[t], *ids, how)]
    s_rows, i_rows, t_rows, j_rows = torch.tensor(rows, device=states.device).T
    keys, wanted = states[s_rows, i_rows], states[t_rows, j_rows]
    shifts = wanted - keys
    if float(torch.linalg.vector_norm(shifts)) <= 1e-6 * float(torch.linalg.vector_norm(keys)):
        raise NoOpError(
            "the edit asks cross-attention for what it already does",
            value=repr(f"{request.subject} -> {request.target}"),
            cause="subject and target look the same to the text encoder",
            hint="choose another target",
        )
    scale = torch.full((len(rows),), how.weight, dtype=torch.float64, device=states.device)
    keys, shifts = reduce_rows(keys, shifts * request.strength, scale, how.tol)
    return States(keys, shifts, len(rows), how.group(request))


def preserved_states(backend: Backend, site: EditSite, request: Request, name: str, how: Reading) -> tuple[Tensor, int]:
    """Keys [m, d] of one preserved name in the request's prompts, and how many tokens they stand for."""
    prompts = list(dict(request.render(name)).items())
    seen = backend.capture([prompt for prompt, _ in prompts], [site], padded=how.pairing == "every")
    states = _states(seen.inputs[site], site)
    if how.pairing == "every":
        keys = states.flatten(0, 1)
    else:
        spans = backend.spans([(prompt, name, at) for prompt, at in prompts])
        kept = [(row, i) for row, span in enumerate(spans) for i in span.positions(how.rule)]
        keys = torch.stack([states[row, i] for row, i in kept])
    reduced, _ = reduce_rows(keys, keys[:, :0], keys.new_ones(len(keys)), how.tol)
    return reduced, len(keys)


def _couples(
    source: SubjectSpan, target: SubjectSpan, ids: Sequence[int], goal_ids: Sequence[int], how: Reading
) -> Iterator[tuple[int, int]]:
    """(position in the source, position in the target) of every pair of one couple of prompts."""
    if how.pairing == "subject":
        ends = target.positions(how.rule)
        for back, i in enumerate(reversed(source.positions(how.rule))):
            yield i, ends[max(len(ends) - 1 - back, 0)]
        return
    yield from ((i, i) for i in range(source.start))
    inner = _inside(ids[source.start : source.stop], goal_ids[target.start : target.stop])
    yield from ((source.start + i, target.start + j) for i, j in enumerate(inner))
    last = len(goal_ids) - 1
    yield from ((i, min(target.stop + i - source.stop, last)) for i in range(source.stop, len(ids)))


def _inside(subject: Sequence[int], target: Sequence[int]) -> list[int]:
    """Per token of the subject its partner in the target: equal tokens in order if all are there, else from the end."""
    found: list[int] = []
    for token in subject:
        start = found[-1] + 1 if found else 0
        if token not in target[start:]:
            return [max(len(target) - len(subject) + i, 0) for i in range(len(subject))]
        found.append(target.index(token, start))
    return found


def _states(inputs: Tensor, site: EditSite) -> Tensor:
    states = inputs.double()
    bad = int((~torch.isfinite(states)).sum())
    if bad:
        raise NonFiniteError(
            f"the input of {site.name} is not finite",
            value=f"{bad} numbers",
            hint="reload the model; float16 may overflow",
        )
    return states
