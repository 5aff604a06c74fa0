"""The plan of an evaluation: which picture is drawn for what, and which names the detector may give it.

Every group holds the same number of pictures, dealt out in turn to its parts (a subject, a kind of prompt, another
concept) and within a part to its prompts. Picture i of a group has the seed `seed + i`, before and after.

    efficacy     the prompts that the edit was solved for
    generality   per subject: unseen templates, other names, compositions
    near, far    other concepts, in the templates that the edit was solved for, where a leak would show first
    everyday     prompts without the subject

A fact ("mascot of rome") is seen in a picture that shows its object. Near to it are the other facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diffedit.errors import RequestError
from diffedit.evaluate import prompts
from diffedit.evaluate.judge import Judge, by_nearness, captions
from diffedit.evaluate.records import Group, Settings
from diffedit.interfaces import Vocabulary
from diffedit.request import Kind, Request, edited_names
from diffedit.targets import general_nouns, other_facts
from diffedit.text import clean, noun, render

EDIT, TEMPLATES, ALIASES, COMPOSED = "prompts of the edit", "unseen templates", "other names", "compositions"
SAME, NEAREST, GIVEN, OTHERS = "same category", "nearest names", "named by the user", "other concepts"
FACTS = "other facts"
_FAR_NOUNS = 24


@dataclass(frozen=True)
class Job:
    """One pair of pictures to draw.

    Attributes:
        group: what for.
        name: the concept that it should show; empty for everyday prompts.
        kind: the part that it belongs to.
        space: which names the detector chooses from.
        prompt: the prompt.
        seed: the seed.
    """

    group: Group
    name: str
    kind: str
    space: Kind
    prompt: str
    seed: int


@dataclass(frozen=True)
class Suite:
    """The jobs of an evaluation, and what the detectors may answer.

    Attributes:
        jobs: in drawing order, group by group.
        labels: per kind of concept, the captions of every name; see `judge.captions`.
        targets: per subject, the names that count as its target; none if the detector does not know the target.
        preserved: names that the edit was asked to keep, in lower case.
        shown: fact -> the object that a picture of it shows.
    """

    jobs: tuple[Job, ...]
    labels: dict[Kind, dict[str, list[str]]]
    targets: dict[str, tuple[str, ...]]
    preserved: frozenset[str]
    shown: Mapping[str, str] = field(default_factory=dict)

    def seen(self, job: Job, label: str) -> str:
        """The name of what a picture of the job shows, from the detector's label."""
        return job.name if self.shown.get(job.name) == label else label


def build(requests: Sequence[Request], vocabulary: Vocabulary, judge: Judge, settings: Settings) -> Suite:
    """The plan for an edit.

    Args:
        requests: what the edit changes.
        vocabulary: of the model.
        judge: its text tower says what is near.
        settings: what the user wants.

    Raises:
        RequestError: a name is blank, edited itself, or given as near and as far; aliases for several subjects.
    """
    near, far = (_names(names, what, requests) for names, what in ((settings.near, "near"), (settings.far, "far")))
    twice = sorted({name.casefold() for name in near} & {name.casefold() for name in far})
    if twice:
        raise RequestError("a concept is given as near and as far", value=repr(twice[0]), hint="drop one of them")
    if settings.aliases and len(requests) > 1:
        raise RequestError("other names belong to one subject", value=len(requests), hint="leave them out")
    more = _names(settings.aliases, "alias", ())
    edited = tuple(dict.fromkeys(name for request in requests for name in (*request.names, *more)))
    kinds: tuple[Kind, ...] = tuple(dict.fromkeys(request.kind for request in requests))
    close = _near(requests, vocabulary, judge, settings, near, edited)
    taken = {*(name.casefold() for name in edited), *(name.casefold() for _, name, _ in close)}
    remote = _far(requests, vocabulary, judge, far, taken)
    plans: dict[Group, list[_Part]] = {
        "efficacy": [_Part(r.subject, EDIT, r.kind, prompts.edit_prompts(r)) for r in requests],
        "generality": [part for r in requests for part in _generality(r, vocabulary, more, edited)],
        "near": [_Part(name, kind, space, _kept(name, space, requests)) for space, name, kind in close],
        "far": [_Part(name, kind, space, _kept(name, space, requests)) for space, name, kind in remote],
        "everyday": [
            _Part("", "everyday prompts", kinds[0], (text,))
            for text in (_everyday(settings) or prompts.everyday(vocabulary, edited, settings.images))
        ],
    }
    return Suite(
        jobs=tuple(job for group, parts in plans.items() for job in _deal(group, parts, settings)),
        labels={
            space: captions(space, _labels(space, requests, vocabulary, close + remote)) for space in _spaces(plans)
        },
        targets={request.subject: _targets(request, vocabulary, close + remote) for request in requests},
        preserved=frozenset(name.casefold() for request in requests for name in request.preserve),
        shown={name: shown for name in _drawn(plans) if (shown := vocabulary.fact(name)) is not None},
    )


@dataclass(frozen=True)
class _Part:
    name: str
    kind: str
    space: Kind
    prompts: tuple[str, ...]


_Named = tuple[Kind, str, str]


def _deal(group: Group, parts: Sequence[_Part], settings: Settings) -> list[Job]:
    """Pictures in turn to the parts; each part goes through its prompts, starting at another one."""
    count = max(settings.images, len({part.name for part in parts}) if group == "efficacy" else 0) if parts else 0
    jobs = []
    for i in range(count):
        turn, which = divmod(i, len(parts))
        part = parts[which]
        shift = which if group in ("near", "far") else 0
        prompt = part.prompts[(turn + shift) % len(part.prompts)]
        jobs.append(Job(group, part.name, part.kind, part.space, prompt, settings.seed + i))
    return jobs


def _generality(request: Request, vocabulary: Vocabulary, more: Sequence[str], edited: Sequence[str]) -> list[_Part]:
    kinds = {
        TEMPLATES: prompts.unseen_templates(request),
        ALIASES: prompts.alias_prompts(request, more, forms=vocabulary.fact(request.subject) is None),
        COMPOSED: prompts.compositions(request, vocabulary, [n for n in edited if n not in request.names]),
    }
    return [_Part(request.subject, kind, request.kind, texts) for kind, texts in kinds.items() if texts]


def _kept(name: str, space: Kind, requests: Sequence[Request]) -> tuple[str, ...]:
    """Prompts of another concept: the edit's own templates if it edits that kind, else plain ones."""
    own = [template for request in requests if request.kind == space for template in request.templates]
    plain = ("{}", "a {}", "a picture of a {}") if space == "object" else ("a picture in the style of {}",)
    return tuple(dict.fromkeys(render(template, name)[0] for template in (own or plain)))


def _near(
    requests: Sequence[Request],
    vocabulary: Vocabulary,
    judge: Judge,
    settings: Settings,
    given: Sequence[str],
    edited: Sequence[str],
) -> list[_Named]:
    if given:
        return [(_space(name, vocabulary, requests[0].kind), name, GIVEN) for name in given]
    out: list[_Named] = []
    avoid = {name.casefold() for name in (*edited, *settings.far)}
    for space in dict.fromkeys(request.kind for request in requests):
        subjects = [request.subject for request in requests if request.kind == space]
        facts = [subject for subject in subjects if vocabulary.fact(subject) is not None]
        if facts:
            others = [name for name in other_facts(facts, vocabulary) if name.casefold() not in avoid]
            out += [(space, name, FACTS) for name in others[: settings.neighbours]]
            subjects = [subject for subject in subjects if subject not in facts]
        if not subjects:
            continue
        pool = [name for name in _known(space, vocabulary) if name.casefold() not in avoid]
        filed = {vocabulary.categories.get(subject.casefold()) for subject in subjects} - {None}
        same = [name for name in pool if space == "object" and vocabulary.categories.get(name.casefold()) in filed]
        most = settings.neighbours if same else min(settings.neighbours, (len(pool) + 1) // 2)  # some are to be far
        ranked = by_nearness(judge, subjects, same or pool, space)[:most]
        out += [(space, name, SAME if same else NEAREST) for name in ranked]
    return out


def _far(
    requests: Sequence[Request], vocabulary: Vocabulary, judge: Judge, given: Sequence[str], taken: set[str]
) -> list[_Named]:
    """For objects the rest of the vocabulary, or general nouns in the farther half; for styles plain objects."""
    if given:
        return [(_space(name, vocabulary, "object"), name, GIVEN) for name in given]
    pool = [name for name in _known("object", vocabulary) if name.casefold() not in taken]
    if not vocabulary.objects:
        subjects = [request.subject for request in requests if request.kind == "object"]
        ranked = by_nearness(judge, subjects, pool, "object") if subjects else pool
        half = ranked[len(ranked) // 2 :]
        pool = half[:: max(1, len(half) // _FAR_NOUNS)][:_FAR_NOUNS]
    step = prompts.stride(len(pool)) if pool else 1
    spread = [pool[(i * step) % len(pool)] for i in range(len(pool))]
    return [("object", name, OTHERS) for name in spread]


def _space(name: str, vocabulary: Vocabulary, default: Kind) -> Kind:
    """What kind of concept a named one is: what the vocabulary says, else the default."""
    spaces: tuple[tuple[Kind, tuple[str, ...]], ...] = (("object", vocabulary.objects), ("style", vocabulary.styles))
    for space, names in spaces:
        if name.casefold() in {known.casefold() for known in names}:
            return space
    return default


def _known(space: Kind, vocabulary: Vocabulary) -> tuple[str, ...]:
    if space == "style":
        return vocabulary.styles or prompts.GENERAL_STYLES
    return vocabulary.objects or general_nouns()


def _labels(
    space: Kind, requests: Sequence[Request], vocabulary: Vocabulary, others: Sequence[_Named]
) -> tuple[str, ...]:
    """What a picture may be named: the vocabulary, or else every name that is drawn, and the targets."""
    listed = vocabulary.objects if space == "object" else vocabulary.styles
    names = [*listed, *(name for kind, name, _ in others if kind == space)]
    names += [request.subject for request in requests if request.kind == space]
    if not listed:
        names += [request.target for request in requests if request.kind == space and request.target]
    names = [name for name in names if vocabulary.fact(name) is None]
    return tuple({name.casefold(): name for name in reversed(names)}.values())[::-1]


def _targets(request: Request, vocabulary: Vocabulary, others: Sequence[_Named]) -> tuple[str, ...]:
    """The target if the detector knows it, and what the vocabulary files under it."""
    if request.target is None or request.kind == "style":
        return ()
    target = request.target.casefold()
    known = _labels("object", [request], vocabulary, others)
    same = [name for name in known if name.casefold() == target]
    below = [name for name in known if vocabulary.categories.get(name.casefold(), "").casefold() == target]
    return tuple(name for name in (same or below) if name.casefold() != request.subject.casefold())


def _drawn(plans: Mapping[Group, Sequence[_Part]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.name for parts in plans.values() for part in parts if part.name))


def _everyday(settings: Settings) -> tuple[str, ...]:
    return tuple(dict.fromkeys(clean(text, "everyday prompt") for text in settings.everyday))


def _names(given: Sequence[str], what: str, requests: Sequence[Request]) -> list[str]:
    edited = edited_names(requests)
    names = list(dict.fromkeys(noun(clean(name, f"{what} concept")) for name in given))
    for name in names:
        if name.casefold() in edited:
            raise RequestError(f"a {what} concept is edited itself", value=repr(name), hint="name another one")
    return names


def _spaces(plans: dict[Group, list[_Part]]) -> tuple[Kind, ...]:
    groups: tuple[Group, ...] = ("efficacy", "generality", "near", "far")
    return tuple(dict.fromkeys(part.space for group in groups for part in plans[group]))
