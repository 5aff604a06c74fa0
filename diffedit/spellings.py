"""How one name is written in other ways, and mistyped: rules on letters, which know no model and no other name.

Forms: plural and singular by the rules of the library `pluralizer` (a port of pluralize.js); hyphens, spaces or nothing
between words; without accents or apostrophes; case and possessive. Slips: two neighbours swapped, a letter left out, a
letter doubled, a double letter single; inner letters first, for those are mistyped unseen, and never the first letter
of a word. Short words have fewer slips, since these would be other words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from diffedit.request import Kind

WORD = re.compile(r"[^\W\d_]+")

_LEAST_SWAPPED, _LEAST_SHORTENED, _LEAST_DOUBLED = 3, 5, 3  # letters of a word
_BETWEEN = re.compile(r"(?<=\w)[ -](?=\w)")
_INFLECTED = re.compile(r"[A-Za-z]{2,}")
# Singulars that end in s and that the library takes for plurals, or whose plural it has otherwise.
_SINGULAR = {"lens": "lenses", "axis": "axes", "iris": "irises", "species": "species", "virus": "viruses"}


def forms(subject: str, kind: Kind, tokenized: bool) -> Iterator[tuple[str, str]]:
    """(name, reason) of every other way to write the subject; some may be the subject itself.

    Args:
        subject: as it stands in a request.
        kind: a style is not inflected.
        tokenized: whether the caller will compare tokens; case and possessive make sense only then.
    """
    start = max((match.end() for match in re.finditer(r"[^\w]|_", subject)), default=0)
    before, last = subject[:start], subject[start:]
    if kind == "object" and _INFLECTED.fullmatch(last):
        yield from ((before + word, reason) for word, reason in _inflections(last))
    if _BETWEEN.search(subject):
        yield _BETWEEN.sub(" ", subject), "with spaces"
        yield _BETWEEN.sub("-", subject), "with hyphens"
        if len(_BETWEEN.findall(subject)) == 1:
            yield _BETWEEN.sub("", subject), "as one word"
    plain = "".join(char for char in unicodedata.normalize("NFD", subject) if unicodedata.category(char) != "Mn")
    if WORD.search(plain):
        yield unicodedata.normalize("NFC", plain), "without accents"
    yield re.sub(r"(?<=\w)['\u2019](?=\w)", "", subject), "without the apostrophe"
    if tokenized and kind == "object":
        yield f"{subject}'s", "possessive"
    if tokenized:
        yield subject.lower(), "in lower case"
        yield subject.upper(), "in capitals"
        yield subject.title(), "capitalised"


def _inflections(word: str) -> Iterator[tuple[str, str]]:
    """Plural and singular of one word, as far as it has them."""
    rules = _rules()
    proper = word[0].isupper() and not word.isupper()
    if proper and not rules.is_plural(word):
        yield word + ("es" if re.search(r"(?:s|x|z|ch|sh)$", word) else "s"), "plural"
    plural, singular = rules.plural(word), rules.singular(word)
    if plural != word:
        yield plural, "plural"
    elif singular != word and not proper and rules.plural(singular) == word:
        yield singular, "singular"


@cache
def _rules() -> Any:
    from pluralizer import Pluralizer  # 40 ms that only an expansion needs

    untyped: Any = Pluralizer
    rules = untyped()
    for one, many in _SINGULAR.items():
        rules.add_irregular_rule(one, many)
    return rules


def slips(subject: str) -> Iterator[tuple[str, str]]:
    """(misspelling, kind of slip), kind by kind, long words first, inner letters first."""
    words = sorted(WORD.finditer(subject), key=lambda match: (match.start() - match.end(), match.start()))
    for slip, rule in _RULES.items():
        for match in words:
            for word in rule(match[0]):
                yield subject[: match.start()] + word + subject[match.end() :], slip


def _swapped(word: str) -> Iterator[str]:
    if len(word) >= _LEAST_SWAPPED:
        for i in _from_the_middle(range(1, len(word) - 1), (len(word) - 2) / 2):
            yield word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def _left_out(word: str) -> Iterator[str]:
    if len(word) >= _LEAST_SHORTENED:
        for i in _from_the_middle(range(1, len(word)), (len(word) - 1) / 2):
            if word[i] not in (word[i - 1], word[i + 1 : i + 2]):
                yield word[:i] + word[i + 1 :]


def _doubled(word: str) -> Iterator[str]:
    if len(word) >= _LEAST_DOUBLED:
        for i in _from_the_middle(range(1, len(word)), (len(word) - 1) / 2):
            if word[i] not in (word[i - 1], word[i + 1 : i + 2]):
                yield word[:i] + word[i] + word[i:]


def _single(word: str) -> Iterator[str]:
    if len(word) > _LEAST_DOUBLED:
        for i in _from_the_middle(range(1, len(word)), (len(word) - 1) / 2):
            if word[i] == word[i - 1]:
                yield word[:i] + word[i + 1 :]


_RULES: dict[str, Callable[[str], Iterator[str]]] = {
    "two letters swapped": _swapped,
    "a letter left out": _left_out,
    "a letter doubled": _doubled,
    "a double letter single": _single,
}


def _from_the_middle(places: Sequence[int], middle: float) -> list[int]:
    return sorted(places, key=lambda i: (abs(i - middle), -i))
