"""Which prompts a before/after picture should show.

A convincing picture has three groups: the subject (should change), its neighbours (must not, and are the likeliest to)
and unrelated things (must not either). Neighbours are what the caller wants preserved, then the names from the model's
vocabulary whose prompts its own text encoder puts closest to the subject; the unrelated ones are the farthest. A model
without a vocabulary gets two everyday prompts instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffedit.text import render, with_article

if TYPE_CHECKING:
    from diffedit.editor import Editor
    from diffedit.request import Request

SUBJECT, NEIGHBOURS, UNRELATED = "subject", "neighbours", "unrelated"
PER_GROUP = 2
_EVERYDAY = ("a castle on a hill", "a bowl of fruit")


@dataclass(frozen=True)
class Scene:
    """One prompt and the group it belongs to."""

    group: str
    prompt: str


def choose_scenes(editor: Editor, requests: Sequence[Request]) -> tuple[Scene, ...]:
    """Prompts for the picture of an edit, grouped, without repetition."""
    from diffedit.request import edited_names
    from diffedit.targets import other_facts

    style = requests[0].kind == "style"
    edited = edited_names(requests)
    pool = editor.vocabulary.styles if style else editor.vocabulary.objects
    ranked = _nearest(editor, requests[0].subject, [name for name in pool if name.casefold() not in edited])
    kept = [name for request in requests for name in request.preserve]
    if editor.vocabulary.fact(requests[0].subject) is not None:
        kept = [*other_facts([request.subject for request in requests], editor.vocabulary), *kept]
    neighbours = list(dict.fromkeys([*kept, *ranked]))[:PER_GROUP]
    if not neighbours:
        neighbours = [request.target for request in requests if request.target][:PER_GROUP]

    things = list(editor.vocabulary.objects) or ["house", "tree"]
    scenes = [Scene(SUBJECT, prompt) for prompt in _subject_prompts(requests, style, things)]
    scenes += [Scene(NEIGHBOURS, _phrase(name, style, things[0])) for name in neighbours]
    if style:
        scenes += [Scene(UNRELATED, with_article(name)) for name in things[-PER_GROUP:]]
    elif len(ranked) > PER_GROUP:
        scenes += [Scene(UNRELATED, with_article(name)) for name in ranked[max(PER_GROUP, len(ranked) - PER_GROUP) :]]
    else:
        scenes += [Scene(UNRELATED, prompt) for prompt in _EVERYDAY]
    return tuple({scene.prompt: scene for scene in reversed(scenes)}.values())[::-1]


def _subject_prompts(requests: Sequence[Request], style: bool, things: Sequence[str]) -> list[str]:
    if len(requests) > 1:
        return [_phrase(request.subject, style, things[0]) for request in requests[: PER_GROUP + 1]]
    subject = requests[0].subject
    if style:
        return [_phrase(subject, style, thing) for thing in things[:PER_GROUP]]
    return [with_article(subject), render("a picture of a {}", subject)[0]]


def _phrase(name: str, style: bool, thing: str) -> str:
    return f"{with_article(thing)} in the style of {name}" if style else with_article(name)


def _nearest(editor: Editor, subject: str, names: Sequence[str]) -> list[str]:
    """`names` by cosine between centred text features and the subject's, closest first."""
    if len(names) < 2:
        return list(names)
    features = editor.backend.features([with_article(name) for name in (subject, *names)])
    features = features - features.mean(0, keepdim=True)
    features = features / features.norm(dim=1, keepdim=True).clamp_min(1e-12)
    scores = (features[1:] @ features[0]).tolist()
    return [name for _, name in sorted(zip(scores, names, strict=True), key=lambda pair: (-pair[0], pair[1]))]
