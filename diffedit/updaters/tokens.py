"""Which tokens are paired: from requests to places in prompts.

A request asks that some tokens of its source prompts ("a photo of a [dog]") be what tokens of its target prompts ("a
photo of a [cat]") are; a preserved name asks that its own tokens stay. Both are listed here as pairs of places, before
any number is read. Tens of thousands of prompts go in portions that bound what is held in memory at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from diffedit.errors import RequestError
from diffedit.interfaces import Backend
from diffedit.reading import Numbers, Place
from diffedit.request import Request
from diffedit.site import EditSite, SubjectSpan, TokenRule
from diffedit.text import render

PROMPTS = 1 << 16


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
class Entry:
    """One request, or one preserved name.

    Attributes:
        request: the request that asks.
        held: the preserved name; `None` for the request itself.
        weights: how much its pairs count.
        group: sixteen hex digits that say which prompts stand around a name, and how its tokens weigh.
        phrases: (prompt, name in it, character offset) of all its prompts.
        couples: (source, target) in `phrases`.
    """

    request: Request
    held: str | None
    weights: PairWeights
    group: str
    phrases: tuple[tuple[str, str, int], ...]
    couples: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Listed:
    """The pairs of a portion of entries.

    Attributes:
        places: distinct tokens, as `Backend.read` takes them.
        sources: per pair, index in `places`.
        targets: likewise; the source itself where a token stays.
        weights: per pair.
        counts: pairs of each entry.
    """

    places: tuple[Place, ...]
    sources: Numbers
    targets: Numbers
    weights: npt.NDArray[np.float64]
    counts: tuple[int, ...]

    def parts(self, pairs: int) -> Iterator[tuple[slice, Listed]]:
        """A few whole entries at a time, of about so many pairs: (which entries, their pairs among all places)."""
        first = start = stop = 0
        for i, count in enumerate(self.counts):
            if i > first and stop - start + count > pairs:
                yield self._part(slice(first, i), slice(start, stop))
                first, start = i, stop
            stop += count
        if self.counts:
            yield self._part(slice(first, len(self.counts)), slice(start, stop))

    def _part(self, entries: slice, at: slice) -> tuple[slice, Listed]:
        numbers = self.sources[at], self.targets[at], self.weights[at]
        return entries, Listed(self.places, *numbers, self.counts[entries])


def group_of(request: Request, weights: PairWeights) -> str:
    """What makes two requests hold the same keys for the same name: the prompts, and how token kinds weigh."""
    return _group(request.templates, weights)


@lru_cache(64)
def _group(templates: tuple[str, ...], weights: PairWeights) -> str:
    text = repr((templates, weights.subject, weights.eos, weights.padding))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def wanted_entry(request: Request, weights: PairWeights, group: str) -> Entry:
    """The entry of a request: each name in each template, beside the target in the same one."""
    if request.target is None:
        raise RequestError("the request has no target yet", value=repr(request.subject))
    goals = _goals(request.templates, request.target)
    sources = [(prompt, name, at) for name in request.names for prompt, at in request.render(name)]
    return Entry(request, None, weights, group, (*goals, *sources), _couples(len(goals), len(sources)))


@lru_cache(64)
def _goals(templates: tuple[str, ...], target: str) -> tuple[tuple[str, str, int], ...]:
    """The phrases of a target, which requests often share."""
    rendered = (render(template, target) for template in templates)
    return tuple((prompt, target, at) for prompt, at in rendered)


@lru_cache(64)
def _couples(goals: int, sources: int) -> tuple[tuple[int, int], ...]:
    """Each source beside the goal in the same template."""
    return tuple((goals + i, i % goals) for i in range(sources))


def held_entry(request: Request, name: str, weights: PairWeights, group: str) -> Entry:
    """The entry of a preserved name: each kind of token that is edited is also held still."""
    phrases = tuple((prompt, name, at) for prompt, at in dict(request.render(name)).items())
    return Entry(request, name, weights, group, phrases, tuple((i, i) for i in range(len(phrases))))


def portions(backend: Backend, entries: Sequence[Entry], sites: Sequence[EditSite]) -> Iterator[list[int]]:
    """Indices of entries to read together: up to `PROMPTS`, or one entry where the backend's numbers need that."""
    for padded in (False, True):
        alike = [i for i, entry in enumerate(entries) if (entry.weights.padding > 0) is padded]
        most = PROMPTS if alike and backend.independent(sites, padded=padded) else 0
        portion: list[int] = []
        prompts = 0
        for i in alike:
            if portion and prompts + len(entries[i].phrases) > most:
                yield portion
                portion, prompts = [], 0
            portion.append(i)
            prompts += len(entries[i].phrases)
        if portion:
            yield portion


def list_pairs(backend: Backend, entries: Sequence[Entry], rule: TokenRule, site: EditSite) -> Listed:
    """Find the phrases in their prompts' tokens and pair them.

    Args:
        backend: the model.
        entries: one portion.
        rule: which tokens of a name are paired.
        site: any of the sites.

    Raises:
        RequestError: a name is no whole word in a template, or no pair has a weight.
        SubjectTruncatedError: a name lies beyond what the encoder reads.
    """
    spans = backend.spans([phrase for entry in entries for phrase in entry.phrases])
    padded = entries[0].weights.padding > 0
    length = backend.positions(spans[0].prompt, site) if padded else 0
    places: dict[tuple[str, int], int] = {}
    listed: list[Place] = []
    sources: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    counts: list[int] = []

    def at(span: SubjectSpan, position: int) -> int:
        key = span.prompt, position
        if key not in places:
            places[key] = len(listed)
            listed.append((span, position))
        return places[key]

    first = 0
    for entry in entries:
        before = len(sources)
        for s, t in entry.couples:
            source, target = spans[first + s], spans[first + t]
            for i, j, weight in _pairs(source, target, rule, entry.weights, length):
                sources.append(at(source, i))
                targets.append(at(target, j))
                weights.append(weight)
        first += len(entry.phrases)
        counts.append(len(sources) - before)
        if not counts[-1]:
            raise RequestError(
                "no token pairs are left", cause="every pair weight is 0", hint="give the subject tokens a weight"
            )
    return Listed(tuple(listed), np.array(sources), np.array(targets), np.array(weights), tuple(counts))


def _pairs(
    source: SubjectSpan, target: SubjectSpan, rule: TokenRule, weights: PairWeights, length: int
) -> Iterator[tuple[int, int, float]]:
    """Positions of one couple of prompts: subject tokens from the end, then what follows them, by offset."""
    if weights.subject > 0:
        goal = target.positions(rule)
        for back, i in enumerate(reversed(source.positions(rule))):
            yield i, goal[max(len(goal) - 1 - back, 0)], weights.subject
    if weights.eos > 0 and rule is not TokenRule.EOS:
        for i, j in zip(range(source.stop, source.eos + 1), range(target.stop, target.eos + 1), strict=False):
            yield i, j, weights.eos
    if weights.padding > 0:
        for step in range(1, length - source.eos):
            yield source.eos + step, min(target.eos + step, length - 1), weights.padding
