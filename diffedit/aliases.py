"""Other names of a subject: its inflections and spellings, and what comes of a slip of the finger.

    expand("crystal ball", "forms")   ->  crystal balls (plural), crystal-ball (with hyphens), crystalball (as one word)
    expand("horse", "all")            ->  the same kinds, and hosre, hrose, hore, horrse, ... (misspelt)

What a text encoder reads for "dogs" is another vector than for "dog", so an edit of one leaves the other unless it is
named. Which names there are is a matter of rules (`diffedit.spellings`): `forms` are other ways to write the same
name, `all` adds misspellings, `SLIPS` of each kind. What the model's tokenizer reads as it reads the subject is no
other name: CLIP's lowers all letters, and cuts "'s" off, so that neither case nor possessive counts there.

A name that means something else is dropped, with the reason: another subject, a target, a name to preserve; for slips
also every word that is known, be it from the model's vocabulary, from the general nouns, or because the tokenizer has
one token for it. Everything here is a function of its arguments; a request records the names, and `reasons` finds again
where each comes from.

Limits: English, and rules, not a dictionary ("pants" has the singular "pant"). A name that begins with a capital is
taken for a proper one and has no singular ("Mercedes"). A slip that ends in the token of a common syllable moves that
syllable a little as well.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from diffedit.errors import DiffEditError, RequestError, nearest
from diffedit.request import Kind, Request, edited_names, make_request
from diffedit.spellings import WORD, forms, slips
from diffedit.text import clean, noun

Expand = Literal["none", "forms", "all"]
Tokens = Callable[[str], Sequence[int]]

SLIPS = 2


@dataclass(frozen=True)
class Alias:
    """Another name, and what makes it one (or, for a dropped one, why it is none)."""

    name: str
    reason: str


@dataclass(frozen=True)
class Expansion:
    """Other names of one subject.

    Attributes:
        aliases: to be edited with the subject, in a fixed order.
        dropped: what would have been one but means something else, or is not read as a name of its own.
    """

    aliases: tuple[Alias, ...]
    dropped: tuple[Alias, ...]


def expand(
    subject: str,
    how: Expand = "forms",
    *,
    kind: Kind = "object",
    given: Collection[str] = (),
    taken: Mapping[str, str] | None = None,
    words: Collection[str] = (),
    tokens: Tokens | None = None,
) -> Expansion:
    """Other names of a subject.

    Args:
        subject: as it stands in a request.
        how: `none` for nothing, `forms` for other ways to write it, `all` for misspellings too.
        kind: a style is not inflected.
        given: names that it has already.
        taken: names that no alias may have, case-folded, and why not ("a target of the edit").
        words: case-folded words that no misspelling may be.
        tokens: what the model's tokenizer makes of a name, to tell what it reads differently; without it case and
            possessive are left alone.

    Raises:
        RequestError: another value of `how`.
    """
    check_expand(how)
    own = tokens(subject) if tokens else ()
    read = {tuple(tokens(name)) for name in (subject, *given)} if tokens and own else set()
    seen, aliases, dropped, counts = {subject, *given}, [], [], dict[str, int]()
    for alias, slip in _candidates(subject, how, kind, tokenized=bool(own)):
        if alias.name in seen or (slip and counts.get(slip, 0) == SLIPS):
            continue
        seen.add(alias.name)
        found = tuple(tokens(alias.name)) if tokens and own else ()
        if own and (not found or found in read or (alias.reason == "possessive" and found[: len(own)] == tuple(own))):
            continue  # cannot be read, or is read as the name is
        folded = alias.name.casefold()
        why = (taken or {}).get(folded) if folded != subject.casefold() else None
        if why is None and slip and (folded in words or _known(alias.name, subject, words, tokens if own else None)):
            why = "a word of its own"
        if why is not None:
            dropped.append(Alias(alias.name, f"{alias.reason}, but {why}"))
            continue
        aliases.append(alias)
        counts[slip] = counts.get(slip, 0) + 1
        read.add(found)
    return Expansion(tuple(aliases), tuple(dropped))


def reasons(request: Request) -> tuple[Alias, ...]:
    """A request's aliases, each with what makes it one: a rule of this module, or that it was given."""
    if not request.aliases:
        return ()
    rules = {alias.name: alias.reason for alias, _ in reversed([*_candidates(request.subject, "all", request.kind)])}
    return tuple(Alias(name, rules.get(name, "given")) for name in request.aliases)


def other_names(request: Request) -> str:
    """A request's aliases with their reasons, for a person; empty if it has none.

    >>> other_names(make_request(subject="dog", aliases=["dogs", "hound"]))
    "'dogs' (plural), 'hound' (given)"
    """
    return ", ".join(f"{alias.name!r} ({alias.reason})" for alias in reasons(request))


def widen(
    requests: Sequence[Request],
    how: Expand,
    *,
    listed: bool,
    known: Collection[str] = (),
    general: Collection[str] = (),
    tokens: Tokens | None = None,
) -> tuple[list[Request], list[str]]:
    """Requests of one edit with the other names of every subject added to its aliases.

    Args:
        requests: targets may be missing.
        how: see `expand`.
        listed: whether the user listed what to preserve. Then no alias may be in the list; else the list gives way.
        known: names of things and styles that the model is known to know. If a subject is among them, the others mean
            other things, whatever their form.
        general: words that no misspelling may be.
        tokens: see `expand`.

    Returns:
        The requests, and what was dropped, a sentence each.
    """
    check_expand(how)
    if how == "none":
        return list(requests), []
    names = {name.casefold() for name in known}
    words = {word for name in (*names, *(name.casefold() for name in general)) for word in (name, *name.split())}
    taken = {request.target.casefold(): "a target of the edit" for request in requests if request.target is not None}
    if listed:
        taken |= {name.casefold(): "to be preserved" for request in requests for name in request.preserve}
    taken |= {name.casefold(): "edited already" for request in requests for name in request.names}
    elsewhere = ChainMap(taken, dict.fromkeys(names, "the model knows it as something else"))
    wide, notes = [], []
    for request in requests:
        barred = elsewhere if request.subject.casefold() in names else taken
        rules: dict[str, Any] = {
            "kind": request.kind,
            "given": request.aliases,
            "taken": barred,
            "words": words,
            "tokens": tokens,
        }
        found = expand(request.subject, how, **rules)
        aliases = (*request.aliases, *(alias.name for alias in found.aliases))
        taken |= {name.casefold(): "edited already" for name in aliases}
        wide.append(
            make_request(**{**dict(request), "aliases": aliases, "preserve": request.preserve if listed else ()})
        )
        notes += [f"{alias.name!r} is not edited with {request.subject!r}: {alias.reason}" for alias in found.dropped]
    if listed:
        return wide, notes
    edited = edited_names(wide)
    kept = [tuple(name for name in request.preserve if name.casefold() not in edited) for request in requests]
    return [make_request(**{**dict(new), "preserve": names}) for new, names in zip(wide, kept, strict=True)], notes


def check_expand(how: Any) -> None:
    """Raise `RequestError` if `how` is no value of `Expand`."""
    if how not in get_args(Expand):
        raise RequestError("there is no such expansion", value=repr(how), hint=nearest(str(how), get_args(Expand)))


def _candidates(subject: str, how: Expand, kind: Kind, tokenized: bool = True) -> Iterator[tuple[Alias, str]]:
    """(alias, kind of slip or "") for every rule; only what a request's own clean-up leaves as it is."""
    pairs = [] if how == "none" else [(Alias(name, reason), "") for name, reason in forms(subject, kind, tokenized)]
    if how == "all":
        pairs += [(Alias(name, f"misspelt: {slip}"), slip) for name, slip in slips(subject)]
    for alias, slip in pairs:
        try:
            same = noun(clean(alias.name, "alias")) == alias.name
        except DiffEditError:
            same = False
        if same and alias.name != subject:
            yield alias, slip


def _known(name: str, subject: str, words: Collection[str], tokens: Tokens | None) -> bool:
    """Whether the word that a slip made is a word by itself."""
    correct = {match[0] for match in WORD.finditer(subject)}
    made = [match[0] for match in WORD.finditer(name) if match[0] not in correct]
    return any(word.casefold() in words or (tokens is not None and len(tokens(word)) == 1) for word in made)
