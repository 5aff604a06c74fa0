"""Other people's text inside Markdown and HTML: shown as it is, never obeyed.

Only what could be taken for structure becomes a numeric character reference, so that the file stays readable as it is.
CommonMark never takes a reference for structure, so no link, tag, table cell, code span, heading, mention, formula or
template can come out of such text, in Markdown or in the HTML made of it. (A web address stays one in programs that
look for addresses in finished text; it then leads where it says.)

The text must not begin a line: ours stands before it, or a table's bar. What means something only at the beginning of a
line ("-", "1.", "=", "+") is left alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

_ZERO_WIDTH_JOINER = "\u200d"  # holds composed emoji together

_STRUCTURE = re.compile(
    r"""[\\`*\[\]<>|~\#$@^]                       # always
      | (?<![A-Za-z0-9])_ | _(?![A-Za-z0-9])       # inside a word an underscore is a letter
      | &(?=[A-Za-z0-9\#])                         # a reference
      | :(?=//|[\w+-]+:)                           # an address, an emoji's name
      | (?<=\bwww)\.                               # an address
      | \{(?=[{%\#:])                              # templates
    """,
    re.VERBOSE | re.IGNORECASE,
)


def escape(text: object) -> str:
    """One line of inert Markdown that reads like `str(text)`.

    White space of any kind becomes a space; control, format and bidirectional characters are shown by their code
    points, so that a reader sees them.

    >>> escape("a|b, out_proj (0.5)")
    'a&#124;b, out_proj (0.5)'
    """
    out = []
    for char in str(text):
        kind = unicodedata.category(char)
        if char.isspace():
            out.append(" ")
        elif kind in ("Cc", "Cf", "Cs", "Co", "Cn") and char != _ZERO_WIDTH_JOINER:
            out.append(f"U+{ord(char):04X}")
        else:
            out.append(char)
    line = " ".join("".join(out).split())
    return _STRUCTURE.sub(lambda match: f"&#{ord(match[0])};", line)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table. `head` is ours and taken as it is; every cell is escaped, `Raw` text excepted."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(cell if isinstance(cell, Raw) else escape(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


class Raw(str):
    """Text of our own that `table` may leave alone."""

    __slots__ = ()
