"""Other people's text inside Markdown and HTML: shown as it is, never obeyed.

All ASCII punctuation becomes a numeric character reference. CommonMark never takes a reference for structure, so no
link, tag, table cell, code span, heading, mention or bare web address can come out of such text, in Markdown or in the
HTML made of it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

_ZERO_WIDTH_JOINER = "\u200d"  # holds composed emoji together


def escape(text: object) -> str:
    """One line of inert Markdown that reads like `str(text)`.

    White space of any kind becomes a space; control, format and bidirectional characters are shown by their code
    points, so that a reader sees them.

    >>> escape("a|b")
    'a&#124;b'
    """
    out = []
    for char in str(text):
        kind = unicodedata.category(char)
        if char.isspace():
            out.append(" ")
        elif kind in ("Cc", "Cf", "Cs", "Co", "Cn") and char != _ZERO_WIDTH_JOINER:
            out.append(f"U+{ord(char):04X}")
        elif char.isascii() and not char.isalnum() and char not in ",-":
            out.append(f"&#{ord(char)};")
        else:
            out.append(char)
    return " ".join("".join(out).split())


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table. `head` is ours and taken as it is; every cell is escaped, `Raw` text excepted."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(cell if isinstance(cell, Raw) else escape(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


class Raw(str):
    """Text of our own that `table` may leave alone."""

    __slots__ = ()
