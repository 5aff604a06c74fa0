"""What an edit will be and what it will cost, before anything is changed: the result of `Editor.plan`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from diffedit.request import Request
from diffedit.site import Role, TokenRule


class PlannedSite(BaseModel):
    """One layer that will be edited.

    Attributes:
        name: component and path.
        layer: its number.
        role: what it does in its block.
        d_out: rows of the weight.
        d_in: columns of the weight.
        rank: expected rank of the change; `None` if it cannot be known before.
        rank_bound: the rank cannot be larger.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    layer: int
    role: Role
    d_out: int
    d_in: int
    rank: int | None
    rank_bound: int


class Plan(BaseModel):
    """An edit that was not made.

    Attributes:
        requests: complete, with the targets that the edit would use.
        target_reasons: per request, why that target.
        base: name of the model.
        backend: its family.
        updater: name of the method.
        locator: name of what chose the sites.
        tokens: which tokens of the subject are paired.
        sites: where it would write.
        prompts: how many prompts have to be run.
        pairs: how many (key, value) pairs the solve gets, over all sites; `None` if it cannot be known before.
        files: expected bytes of each file that saving would write; empty if they cannot be known before.
        seconds: expected time from complete requests to weights in the model; `None` if it cannot be known before.
        choosing_seconds: time that choosing the targets took. It is spent: the same editor does not spend it again.
        memory: expected growth of the process above the loaded model, in bytes; `None` if it cannot be known before.
            What is set up once per model is not in it, nor in the seconds.
        sampled: prompts of the largest part of the work that was done, and thrown away, to estimate the rest.
        notes: what else is worth knowing.
    """

    model_config = ConfigDict(frozen=True)

    requests: tuple[Request, ...]
    target_reasons: tuple[str, ...]
    base: str
    backend: str
    updater: str
    locator: str
    tokens: TokenRule
    sites: tuple[PlannedSite, ...]
    prompts: int
    pairs: int | None
    files: dict[str, int]
    seconds: float | None
    choosing_seconds: float
    memory: int | None
    sampled: int
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int | None:
        """Expected size of the saved edit."""
        return sum(self.files.values()) or None

    def summary(self) -> str:
        """A few lines for a person."""
        lines = [
            f"{request.action} {request.subject!r} -> {request.target!r} ({reason})"
            for request, reason in zip(self.requests, self.target_reasons, strict=True)
        ]
        lines += [
            f"  {site.name} [{site.d_out} x {site.d_in}]: rank "
            + (f"about {site.rank}" if site.rank is not None else "unknown")
            + f", at most {site.rank_bound}"
            for site in self.sites
        ]
        pairs = "an unknown number of" if self.pairs is None else self.pairs
        lines.append(f"{self.updater} from {self.prompts} prompts and {pairs} pairs")
        if self.seconds is not None and self.memory is not None:
            lines.append(f"about {duration(self.seconds)}, {size(self.memory)} above the model")
        if self.bytes is not None:
            lines.append(f"about {size(self.bytes)} in {len(self.files)} files")
        return "\n".join([*lines, *self.notes])


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(0.0071), duration(42.2), duration(9000)
    ('7.1 ms', '42 s', '150 min')
    """
    if seconds < 1:
        return f"{1000 * seconds:.2g} ms" if seconds < 0.1 else f"{1000 * seconds:.0f} ms"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def size(number: float) -> str:
    """Bytes for people.

    >>> size(900), size(24_000), size(3.2e6)
    ('900 B', '24 KB', '3.2 MB')
    """
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number >= step:
            return f"{number / step:.2g} {unit}" if number < 10 * step else f"{number / step:.0f} {unit}"
    return f"{number:.0f} B"
