"""JSON from a stranger: one reading or an error.

Python's `json` accepts duplicate keys (the last one wins), NaN, Infinity, `1e999` (infinity) and nesting until the
stack ends. Each of these lets two readers see two different documents in the same bytes, or ends in an error that is
not ours. Here every such text raises `MalformedArtifactError`, for depth even before the parser runs.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, NoReturn

from diffedit.errors import MalformedArtifactError

MAX_DEPTH = 32
MAX_INTEGER_DIGITS = 19

# A string (or what an unclosed one swallows), or a bracket. Possessive, so it is linear in the text, whatever that is.
_STRUCTURE = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


def loads(text: str, where: str) -> Any:
    """Parse JSON text strictly.

    Args:
        text: the JSON text.
        where: what is being read, for the message.

    Returns:
        The document; objects are plain dicts without repeated keys, numbers are finite.

    Raises:
        MalformedArtifactError: not JSON, deeper than `MAX_DEPTH`, a repeated key, a number that is not finite, or an
            integer of more than `MAX_INTEGER_DIGITS` digits.
    """
    _check_depth(text, where)

    def refuse(what: str) -> NoReturn:
        raise MalformedArtifactError(f"the JSON of {where} {what}", hint="download or save the file again")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            twice = max(Counter(key for key, _ in items).items(), key=lambda item: item[1])[0]
            refuse(f"repeats the key {ascii(twice)[:80]}")
        return out

    def integer(digits: str) -> int:
        if len(digits.lstrip("-")) > MAX_INTEGER_DIGITS:
            refuse(f"holds an integer of {len(digits)} digits")
        return int(digits)

    def real(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            refuse(f"holds a number out of range, {digits[:40]}")
        return value

    def constant(name: str) -> NoReturn:
        refuse(f"holds {name}, which is no JSON number")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_int=integer, parse_float=real, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise MalformedArtifactError(f"{where} holds no valid JSON", value=str(error)[:200]) from error


def _check_depth(text: str, where: str) -> None:
    """Refuse deep nesting before a recursive parser sees it."""
    depth = 0
    for match in _STRUCTURE.finditer(text):
        mark = match[0]
        if mark in ("[", "{"):
            depth += 1
            if depth > MAX_DEPTH:
                raise MalformedArtifactError(
                    f"the JSON of {where} is nested too deeply", value=f"over {MAX_DEPTH} levels"
                )
        elif mark in ("]", "}"):
            depth -= 1
