"""Options that take a list: `--models A B C` means `--models A --models B --models C`.

A list ends where the next option begins, so arguments that are no part of it stand before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

LISTS = ("--edits", "--models")


class ListCommand(TyperCommand):
    """A command whose options in `LISTS` take several values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Spread the lists, then read the arguments as ever."""
        return super().parse_args(ctx, spread(args))


def spread(args: Sequence[str]) -> list[str]:
    """Arguments with every list written as repeated options.

    >>> spread(["--models", "a", "b", "-o", "out"])
    ['--models', 'a', '--models', 'b', '-o', 'out']
    """
    out: list[str] = []
    current: str | None = None
    for index, word in enumerate(args):
        if word == "--":
            return [*out, *args[index:]]
        if word.startswith("-") and word != "-":
            current = word if word in LISTS else None
            out.append(word)
        elif current is not None and out[-1] != current:
            out += [current, word]
        else:
            out.append(word)
    return out
