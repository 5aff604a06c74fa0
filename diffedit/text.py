"""Text rules that every room shares: clean input, find a subject, render a template with the right article.

Tokenisers hide differences that matter here: CLIP's is case-insensitive, composes accents, and cuts a prompt at a
literal `<|endoftext|>`. So text is NFC-normalised and checked once, at the door.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from diffedit.errors import EmptySubjectError, RequestError, SubjectNotFoundError, nearest

_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_ARTICLE = re.compile(r"^(?:(?:a|an|the)\s+)+(?=\S)", re.IGNORECASE)
_DANGLING = re.compile(r"\b(a|an)(\s+)$", re.IGNORECASE)
_VOWEL = re.compile(r"[aeiou]", re.IGNORECASE)
_CONSONANT_SOUND = re.compile(r"(?:uni(?!n)|use|usu|eu|one\b|ukulele)", re.IGNORECASE)


def clean(text: str, what: str) -> str:
    """`text` in NFC, outer and doubled white space removed.

    Args:
        text: what the user gave.
        what: the argument's name, for the message ("subject", "target", ...).

    Raises:
        EmptySubjectError: nothing is left.
        RequestError: not text, unpaired surrogates, control characters, or one of CLIP's special tokens.
    """
    if not isinstance(text, str):
        raise RequestError(f"the {what} must be text", value=type(text).__name__)
    if text.isascii() and text.isprintable() and "<|" not in text and not text.isspace() and text:
        return " ".join(text.split())  # nothing to normalise, nothing to refuse
    if any(unicodedata.category(ch) == "Cs" for ch in text):
        raise RequestError(
            f"the {what} holds an unpaired surrogate", value=ascii(text), hint="decode the text as UTF-8"
        )
    out = " ".join(unicodedata.normalize("NFC", text).split())
    if all(ch == " " or unicodedata.category(ch) == "Cf" for ch in out):  # invisible marks alone say nothing
        raise EmptySubjectError(f"the {what} is empty", value=repr(text), hint=f"name the {what} in words")
    for token in _SPECIAL:
        if token in out.lower():
            raise RequestError(
                f"the {what} holds the tokenizer's special token {token}",
                value=repr(out),
                cause="it would end the prompt there",
                hint="remove it",
            )
    if any(unicodedata.category(ch) == "Cc" for ch in out):
        raise RequestError(f"the {what} holds control characters", value=ascii(out), hint="remove them")
    return out


def noun(phrase: str) -> str:
    """The phrase without a leading article: "a dog" -> "dog", "The Beatles" stays when nothing else is left."""
    return _ARTICLE.sub("", phrase, count=1)


def with_article(phrase: str) -> str:
    """The phrase with "a" or "an" in front: "dog" -> "a dog", "an owl" stays."""
    return phrase if _ARTICLE.match(phrase) else f"{article(phrase)} {phrase}"


def article(phrase: str) -> str:
    """The word "an" before a vowel letter (but for "unicorn", "one", ...), else "a"."""
    return "an" if _VOWEL.match(phrase) and not _CONSONANT_SOUND.match(phrase) else "a"


def render(template: str, phrase: str) -> tuple[str, int]:
    """Fill a template and correct the article in front of its slot.

    Args:
        template: text with exactly one "{}".
        phrase: what goes there.

    Returns:
        The prompt and the character offset at which the phrase starts.

    >>> render("a photo of a {}", "owl")
    ('a photo of an owl', 14)
    """
    before, match, after = _frame(template)
    if match:
        word = article(phrase)
        before = before[: match.start()] + (word.capitalize() if match[1][0].isupper() else word) + match[2]
    return before + phrase + after, len(before)


@lru_cache(1024)
def _frame(template: str) -> tuple[str, re.Match[str] | None, str]:
    """What stands before the slot, the article at its end, what stands after it."""
    before, after = template.split("{}")
    return before, _DANGLING.search(before), after


def find(prompt: str, subject: str) -> list[tuple[int, int]]:
    """Character ranges [start, stop) at which the subject stands as whole words, ignoring case.

    >>> find("A cat in a category of cats", "cat")
    [(2, 5)]
    """
    pattern = re.compile(rf"(?<!\w){re.escape(subject)}(?!\w)", re.IGNORECASE)
    return [match.span() for match in pattern.finditer(prompt)]


def locate(prompt: str, subject: str, occurrence: int | None = None) -> tuple[int, int]:
    """The one range at which the subject stands.

    Args:
        prompt: NFC text.
        subject: NFC text.
        occurrence: 0 for the first, 1 for the second, -1 for the last; needed when it stands there more than once.

    Raises:
        SubjectNotFoundError: no such occurrence, or several and none was chosen.
    """
    found = find(prompt, subject)
    if not found:
        raise SubjectNotFoundError(
            f"the subject {subject!r} does not stand in the prompt as whole words",
            value=repr(prompt),
            hint=nearest(subject, prompt.split()),
        )
    if occurrence is None:
        if len(found) > 1:
            raise SubjectNotFoundError(
                f"the subject {subject!r} stands in the prompt {len(found)} times",
                value=repr(prompt),
                hint="choose one with occurrence=0 for the first, -1 for the last",
            )
        return found[0]
    if not -len(found) <= occurrence < len(found):
        raise SubjectNotFoundError(
            f"there is no occurrence {occurrence} of {subject!r}", value=f"{len(found)} in {prompt!r}"
        )
    return found[occurrence]
