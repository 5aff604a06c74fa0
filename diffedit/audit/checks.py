"""One check of a verification, and how an error becomes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from diffedit.errors import DiffEditError


class Check(BaseModel):
    """One thing that was looked at.

    Attributes:
        name: what was checked: a file's name, or "files", "base: ...", "result".
        outcome: "pass", "fail", "skipped" (it could not be checked, and the detail says why) or "changed" (a text for
            people that is not the one that diffedit would write now: harmless to the weights, but not vouched for).
        detail: what was found.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    outcome: Literal["pass", "fail", "skipped", "changed"]
    detail: str


def attempt(name: str, work: Callable[[], Check]) -> Check:
    """The check that `work` returns, or a failed one that says what `work` raised."""
    try:
        return work()
    except DiffEditError as error:
        return failed(name, error)


def failed(name: str, error: DiffEditError) -> Check:
    """A failed check from an error: case, value and cause in one line."""
    parts = [error.case if error.value is None else f"{error.case}: {error.value}"]
    parts += [error.cause] if error.cause else []
    return Check(name=name, outcome="fail", detail="; ".join(parts))
