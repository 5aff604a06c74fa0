"""What the user left unsaid: the kind of a subject, the prompts around it, and what takes its place.

A style is dropped: "a picture in the style of X" is to read as "a picture in the style of a picture". An object
becomes its category if the model's vocabulary files it under one ("dog" -> "animal"). Anything else becomes the
nearest general noun ("Snoopy" -> "dog"), among the vocabulary's categories or a bundled list.

What says too little brings the subject back by itself: "a vehicle" is drawn as a bus every so often, a picture in no
style in one of the six that the model knows. So where the vocabulary lists only a few of a kind, or others of the
category are edited too, the nearest that stays takes the subject's place. Nearest is by cosine in the model's own text
encoder. The choice and its reason are written into the edit.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from diffedit.aliases import Expand, other_names, widen
from diffedit.errors import DiffEditError, RequestError
from diffedit.interfaces import Backend, Vocabulary
from diffedit.request import OBJECT_TEMPLATES, STYLE_TEMPLATES, Action, Kind, Request, edited_names, make_request
from diffedit.text import noun, with_article

logger = logging.getLogger("diffedit")

STYLE_TARGET = "picture"
FEW_MEMBERS = 10


@cache
def general_nouns() -> tuple[str, ...]:
    """The bundled list, one noun a line."""
    text = (files("diffedit") / "assets" / "general_nouns.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))


def guess_kind(subject: str, vocabulary: Vocabulary) -> tuple[Kind, str]:
    """Whether a subject is a style, and its name without the words that say so.

    >>> guess_kind("in the style of Monet", Vocabulary())
    ('style', 'Monet')
    """
    words = subject.strip()
    for prefix, suffix in (("in the style of ", ""), ("the style of ", ""), ("", " style")):
        lower = words.casefold()
        if lower.startswith(prefix) and lower.endswith(suffix) and len(words) > len(prefix + suffix):
            return "style", words[len(prefix) : len(words) - len(suffix)]
    known = {style.casefold() for style in vocabulary.styles}
    return ("style" if words.casefold() in known else "object"), subject


def default_templates(kind: Kind, vocabulary: Vocabulary) -> tuple[str, ...]:
    """The general templates of a kind, and those that the model's own vocabulary adds."""
    if kind == "style":
        return tuple(dict.fromkeys((*STYLE_TEMPLATES, *vocabulary.style_templates)))
    own = (template.replace("{}", "a {}") for template in vocabulary.templates if template != "{}")
    return tuple(dict.fromkeys((*OBJECT_TEMPLATES, *own, *vocabulary.scene_templates)))


def default_preserve(kind: Kind, edited: Collection[Any], vocabulary: Vocabulary) -> tuple[str, ...]:
    """Everything of the same kind that the model is known to know, facts included, but for what is being edited."""
    known = vocabulary.styles if kind == "style" else (*vocabulary.objects, *vocabulary.facts)
    if not known:
        return ()
    taken = {noun(name).casefold() for name in edited if isinstance(name, str)}
    return tuple(name for name in known if name.casefold() not in taken)


def other_facts(subjects: Collection[str], vocabulary: Vocabulary) -> tuple[str, ...]:
    """The facts beside those of the subjects, the likeliest to be disturbed first: those that share most words.

    Of two that share equally many, the one with a subject's last word comes first: that token is what is edited.
    """
    edited = {subject.casefold() for subject in subjects}
    words = [subject.casefold().split() for subject in subjects if vocabulary.fact(subject) is not None]

    def distance(phrase: str) -> tuple[int, bool]:
        own = phrase.casefold().split()
        return min((-len({*own} & {*other}), own[-1] != other[-1]) for other in words)

    others = [phrase for phrase in vocabulary.facts if phrase.casefold() not in edited]
    return tuple(sorted(others, key=distance)) if words else tuple(others)


class TargetChooser:
    """Chooses targets for one model; the candidates are encoded once, on first use.

    Args:
        backend: the model, with unedited weights whenever `choose` is called.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def nouns(self) -> tuple[str, ...]:
        """The candidates."""
        return self._backend.model.vocabulary.nouns or general_nouns()

    @cached_property
    def _candidates(self) -> Tensor:
        return self._encode(self.nouns)

    def choose(self, request: Request, avoid: Collection[str] = ()) -> tuple[str, str]:
        """A target for a request that has none.

        Args:
            request: the request.
            avoid: names, case-folded, that must not be chosen: subjects of the same edit are about to lose their
                meaning.

        Returns:
            The target and the sentence that explains it.

        Raises:
            RequestError: no candidate is left.
        """
        vocabulary = self._backend.model.vocabulary
        if request.kind == "style":
            listed = request.subject.casefold() in {style.casefold() for style in vocabulary.styles}
            said = f"the model's vocabulary lists the style {request.subject!r}" if listed else "a style is dropped"
            return self._kind_or_member(request, avoid, STYLE_TARGET, said, [vocabulary.styles])
        taken = {name.casefold() for name in request.names}
        filed = vocabulary.categories.get(request.subject.casefold())
        if filed is not None and filed.casefold() not in {*taken, *avoid}:
            members = tuple(name for name in vocabulary.objects if vocabulary.categories.get(name.casefold()) == filed)
            said = f"the model's vocabulary files {request.subject!r} under {filed!r}"
            return self._kind_or_member(request, avoid, filed, said, [members, vocabulary.objects])
        taken |= {name.casefold() for name in request.preserve}
        folded = ((i, word.casefold()) for i, word in enumerate(self.nouns))
        chosen = [i for i, word in folded if word not in taken and word not in avoid]
        if not chosen:
            raise RequestError(
                "no general noun is left to choose from", value=repr(request.subject), hint="name a target"
            )
        nouns = tuple(self.nouns[i] for i in chosen)
        return self._nearest(request.subject, "general nouns", nouns, self._candidates[chosen])

    def _kind_or_member(
        self, request: Request, avoid: Collection[str], whole: str, said: str, lists: Sequence[Sequence[str]]
    ) -> tuple[str, str]:
        """What stands for a whole kind, or the nearest that stays where the kind would bring edited members back.

        Args:
            request: the request.
            avoid: see `choose`.
            whole: what stands for the kind.
            said: why that.
            lists: all that the vocabulary lists of the kind; behind it, where to look if none of these stays.
        """
        taken = {name.casefold() for name in request.names}
        members = lists[0]
        others = [name.casefold() for name in members if name.casefold() not in taken]
        edited = sum(name in avoid for name in others)
        if len(others) == len(members) or (len(members) >= FEW_MEMBERS and not edited):
            return whole, f"{said}: {whole!r} takes its place"
        why = f"with {edited} more of its kind edited" if edited else f"one of only {len(members)} members"
        for names in lists:
            left = tuple(name for name in names if name.casefold() not in {*taken, *avoid})
            if left:
                target, near = self._nearest(
                    request.subject, "others", left, self._encode(left, request.kind), request.kind
                )
                return target, f"{said}, {why}; {near}"
        return whole, f"{said}: {whole!r} takes its place"

    def _nearest(
        self, subject: str, what: str, words: tuple[str, ...], vectors: Tensor, kind: Kind = "object"
    ) -> tuple[str, str]:
        cosine = (vectors @ self._encode((subject,), kind)[0]).tolist()
        scored = sorted((-c, word) for word, c in zip(words, cosine, strict=True))
        reason = f"nearest of {len(scored)} {what} by the model's own text encoder, cosine {-scored[0][0]:.2f}"
        if len(scored) > 1:
            reason += f"; next {scored[1][1]!r}, {-scored[1][0]:.2f}"
        return scored[0][1], reason

    def _encode(self, words: Sequence[str], kind: Kind = "object") -> Tensor:
        """[n, d] unit vectors of "a dog", "an owl", ..., or of "a picture in the style of pixel", ..."""
        prompts = [f"a picture in the style of {word}" if kind == "style" else with_article(word) for word in words]
        return torch.nn.functional.normalize(self._backend.features(prompts).double(), dim=1)


class Completer:
    """Turns what a user says into complete requests for one model.

    Args:
        backend: the model, with unedited weights whenever `fill` is called.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._vocabulary = backend.model.vocabulary
        self._chooser = TargetChooser(backend)
        self._together: tuple[Sequence[Any], frozenset[str]] | None = None

    def request(
        self,
        subject: str,
        action: Action,
        *,
        target: str | None,
        kind: Kind | None,
        preserve: Sequence[str] | None,
        aliases: Sequence[str],
        templates: Sequence[str],
        seed: int,
        together: Sequence[Any],
        preserves: bool,
    ) -> Request:
        """A request with its kind, templates and preserve list filled in.

        Args:
            subject: as the user wrote it; so are `action` to `seed`.
            action: what to do.
            target: what takes its place, or `None`.
            kind: `None` to guess.
            preserve: `None` for everything else that the vocabulary lists, if `preserves`.
            aliases: other names of the subject.
            templates: empty for the default ones.
            seed: of the request.
            together: all subjects of the same edit.
            preserves: whether the updater wants a preserve list.
        """
        if kind is None and isinstance(subject, str):
            kind, subject = guess_kind(subject, self._vocabulary)
        kind = kind or "object"
        if preserve is None:
            preserve = self._preserve(kind, (subject, *aliases), together) if preserves else ()
        return make_request(
            subject=subject,
            action=action,
            target=target,
            kind=kind,
            aliases=aliases,
            templates=templates or default_templates(kind, self._vocabulary),
            preserve=preserve,
            seed=seed,
        )

    def _preserve(self, kind: Kind, names: Sequence[Any], together: Sequence[Any]) -> tuple[str, ...]:
        """`default_preserve`; the list of all subjects, the same for each of them, is looked through once."""
        if self._together is None or self._together[0] is not together:
            self._together = together, frozenset(noun(name).casefold() for name in together if isinstance(name, str))
        known = default_preserve(kind, names, self._vocabulary)
        return tuple(name for name in known if name.casefold() not in self._together[1])

    def widen(self, requests: Sequence[Request], how: Expand, listed: bool) -> tuple[list[Request], list[str]]:
        """The requests with other names of their subjects, and what was left out; see `diffedit.aliases.widen`."""
        known = (*self._vocabulary.objects, *self._vocabulary.styles)
        general = (*general_nouns(), *self._vocabulary.nouns, *self._vocabulary.backgrounds)
        wide, notes = widen(requests, how, listed=listed, known=known, general=general, tokens=self._tokens)
        for request in wide:
            if request.aliases:
                logger.info("with %r: %s", request.subject, other_names(request))
        for note in notes:
            logger.info(note)
        return wide, notes

    def _tokens(self, name: str) -> Sequence[int]:
        """The name's tokens in the model's tokenizer; none if they cannot be told."""
        try:
            span = self._backend.span(name, name, 0)
        except DiffEditError:
            return ()
        return span.tokens[span.start : span.stop]

    def fill(self, requests: Sequence[Request]) -> tuple[list[Request], list[str]]:
        """The requests with every target chosen, and per request why that one."""
        filled, reasons = [], []
        subjects = edited_names(requests)
        for request in requests:
            reason = "given"
            if request.target is None:
                target, reason = self._chooser.choose(request, avoid=subjects)
                request = make_request(**{**request.model_dump(), "target": target})
                logger.info("target for %r: %r, %s", request.subject, target, reason)
            filled.append(request)
            reasons.append(reason)
        return filled, reasons
