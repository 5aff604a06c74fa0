"""What the user sees while an edit is made: a spinner for a solve, a bar with the loss for a training."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffedit.cli.shell import working


@contextlib.contextmanager
def editing(what: str, updater: Any) -> Iterator[Any]:
    """Show that work goes on, on stderr and only if that is a terminal; yields the updater to use inside.

    Args:
        what: the work, in words.
        updater: one that trains (it has `watched`) shows its steps.
    """
    if not hasattr(updater, "watched"):
        with working(what):
            yield updater
        return
    console = Console(stderr=True)
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        contextlib.redirect_stdout(sys.stderr),
    ):
        task = bar.add_task(escape(what), total=None)

        def progress(step: int, steps: int, loss: float) -> None:
            bar.update(task, completed=step, total=steps, description=f"{escape(what)}, loss {loss:.3g}")

        yield updater.watched(progress)
