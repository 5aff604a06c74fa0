"""Which token positions of a prompt a restored run takes from the clean run, as the columns of a trace.

A column must mean the same in every prompt, or effects could not be averaged: the last token of the subject, all its
tokens, the end-of-text token, the padding after it, or, with `each`, every position by its distance from the last
subject token (`-1`, `+0`, `+1`, ...), up to the end-of-text token. Positions before the subject are left out: in a
causal encoder the noise never reaches them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from diffedit.intervention import Part
from diffedit.site import SubjectSpan, TokenRule

Tokens = Literal["last_subject", "all_subject", "eos", "padding", "each"]
WHOLE = "whole"


def column_names(tokens: Sequence[Tokens], spans: Iterable[SubjectSpan]) -> tuple[str, ...]:
    """The columns that the choice stands for, in order, each once.

    >>> column_names(["last_subject", "each"], [SubjectSpan("a hot dog", "hot dog", 2, 4, 4)])
    ('last_subject', '-1', '+0', '+1')
    """
    spans = list(spans)
    names: list[str] = []
    for rule in tokens:
        if rule == "each":
            first = min(span.start - span.last for span in spans)
            last = max(span.eos - span.last for span in spans)
            names += [f"{offset:+d}" for offset in range(first, last + 1)]
        else:
            names.append(rule)
    return tuple(dict.fromkeys(names))


def column_positions(column: str, span: SubjectSpan, length: int) -> tuple[int, ...]:
    """The positions of a column in one prompt; empty if the prompt has none.

    Args:
        column: a name from `column_names`.
        span: where the subject stands.
        length: number of positions that the encoder runs.
    """
    if column == "padding":
        return tuple(range(span.eos + 1, length))
    if column in tuple(TokenRule):
        return span.positions(TokenRule(column))
    position = span.last + int(column)
    return (position,) if span.start <= position <= span.eos else ()


def windows(parts: Sequence[Part], window: int) -> tuple[tuple[Part, ...], ...]:
    """For each part, it and the next `window - 1` of its kind, fewer at the end."""
    by_kind: dict[str, list[Part]] = {}
    for part in parts:
        by_kind.setdefault(part.kind, []).append(part)
    out = []
    for part in parts:
        same = by_kind[part.kind]
        first = same.index(part)
        out.append(tuple(same[first : first + window]))
    return tuple(out)
