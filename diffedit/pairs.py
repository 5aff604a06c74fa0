"""What an edit was solved from: the keys and residuals of each request at one site, in as few rows as they take.

Prompts around one subject differ little, so some twenty templates come down to a handful of rows
(`diffedit.linalg.rows` says how, and what is lost): these *are* the edit's keys, and its rank.

Each request is reduced by itself and each preserved name by itself. That is what makes edits an algebra: pairs of
edits that were made at different times stand beside each other as they would have in one solve, and any one can be
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TypeVar

import torch
from torch import Tensor

from diffedit.errors import ContradictionError, NotComposableError, RequestError
from diffedit.linalg.metric import Metric, same_marks
from diffedit.linalg.overlap import sharing
from diffedit.linalg.rows import reduce_rows as reduce_rows

BLOCK = 4096  # rows that are put together in one piece, at least
MANY = 1  # rows per dimension beyond which the metric takes less room than spreads, and its solve less time

_SAME = 1e-9
DISAGREE = 1e-3  # of what is wanted; pairs are kept in float32


@dataclass(frozen=True, eq=False)
class Wanted:
    """One request at one site.

    Attributes:
        keys: [r, d_in], weights folded in.
        residuals: [r, d_out], wanted minus present output, bias removed, weights folded in.
        count: pairs that the rows stand for.
        group: which prompts were put around the subject and how token kinds were weighted; see `Held`.
        spread: [r, d_in], the keys times the inverse of the metric that the solve is made in (`linalg.metric`); `None`
            if it is made in none.
    """

    keys: Tensor
    residuals: Tensor
    count: int
    group: str
    spread: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Held:
    """One preserved name at one site: keys whose outputs must stay.

    Attributes:
        name: the name.
        group: requests of one group would hold the same keys for the same name, so those count once.
        keys: [m, d_in], weights folded in.
        count: keys that the rows stand for.
        spread: as for `Wanted`.
    """

    name: str
    group: str
    keys: Tensor
    count: int
    spread: Tensor | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What makes two entries the same one."""
        return self.name.casefold(), self.group


_Entry = TypeVar("_Entry", Wanted, Held)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Everything that a solve needs at one site.

    Attributes:
        wanted: one entry per request, in the requests' order.
        held: preserved names, each once.
        weight_norm: Frobenius norm of the unedited weight.
        metric: marks of the metric that the solve is made in (`linalg.metric`); empty without.
        price: that metric itself, for more than `MANY` rows per dimension; no entry has a spread then.
    """

    wanted: tuple[Wanted, ...]
    held: tuple[Held, ...]
    weight_norm: float
    metric: tuple[float, ...] = ()
    price: Metric | None = None

    def stack(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [n, d_in], residuals [n, d_out] and preserve keys [m, d_in] of all entries, float64."""
        keys = _joined([entry.keys for entry in self.wanted])
        residuals = _joined([entry.residuals for entry in self.wanted])
        return keys, residuals, _joined([entry.keys for entry in self.held]) if self.held else keys[:0]

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same keys and residuals some thousand rows at a time; each block takes the memory of the one before."""
        keys, residuals = (_blocks(self.wanted, attrgetter(rows)) for rows in ("keys", "residuals"))
        return zip(keys, residuals, strict=True)

    def held_blocks(self, factor: float = 1.0) -> Iterator[Tensor]:
        """The preserve keys times a factor in the same way."""
        return (keys.mul_(factor) for keys in _blocks(self.held, attrgetter("keys")))

    def measured(self, metric: Metric) -> Pairs:
        """The same pairs with their spreads in a metric, or with the metric; both rounded to float32 like the keys.

        Raises:
            IllConditionedError: the metric excludes every wanted key.
        """
        metric.check_room(_blocks(self.wanted, attrgetter("keys")))
        rows: list[Wanted | Held] = [*self.wanted, *self.held]
        sizes = [len(entry.keys) for entry in rows]
        if sum(sizes) > MANY * metric.root.shape[1]:
            return replace(self, metric=metric.marks, price=metric.rounded())
        spread = torch.split(metric.spread(_joined([entry.keys for entry in rows])), sizes)
        n = len(self.wanted)
        return replace(
            self,
            wanted=tuple(replace(e, spread=part.to(e.keys)) for e, part in zip(self.wanted, spread[:n], strict=True)),
            held=tuple(replace(e, spread=part.to(e.keys)) for e, part in zip(self.held, spread[n:], strict=True)),
            metric=metric.marks,
        )

    def spreads(self) -> Tensor | None:
        """[n + m, d_in] float64: the spreads of all entries, in the order of `stack`; `None` if any has none."""
        found = self.spread_parts()
        return _joined(found) if len(found) == len(self.wanted) + len(self.held) else None

    def spread_parts(self) -> list[Tensor]:
        """The spreads that there are, in that order."""
        entries: list[Wanted | Held] = [*self.wanted, *self.held]
        return [entry.spread for entry in entries if entry.spread is not None]

    def scale(self, factors: Sequence[float]) -> Pairs:
        """Residuals times one factor per request; the solve is linear in them."""
        scaled = (
            replace(entry, residuals=(entry.residuals.double() * factor).to(entry.residuals.dtype))
            for entry, factor in zip(self.wanted, factors, strict=True)
        )
        return replace(self, wanted=tuple(scaled))

    def select(self, chosen: Sequence[int], preserve: Sequence[Collection[str]], edited: Iterable[str]) -> Pairs:
        """The pairs of some requests only.

        Args:
            chosen: which requests, in the new order.
            preserve: per chosen request, the names it preserves.
            edited: names that some chosen request edits: what is edited is not preserved.
        """
        wanted = tuple(self.wanted[i] for i in chosen)
        keys = {(name.casefold(), entry.group) for names, entry in zip(preserve, wanted, strict=True) for name in names}
        taken = {name.casefold() for name in edited}
        kept = (entry for entry in self.held if entry.key in keys and entry.name.casefold() not in taken)
        return replace(self, wanted=wanted, held=tuple(kept))

    def __add__(self, other: Pairs) -> Pairs:
        """Both sides' requests in one solve; a name that both hold in the same way counts once.

        Raises:
            NotComposableError: they were solved in different metrics.
        """
        if not same_marks(self.metric, other.metric):
            raise NotComposableError(
                "the edits were solved in different metrics",
                value=f"{_told(self.metric)} and {_told(other.metric)}",
                cause="what must not change at all, or what everyday prompts say, differs between them",
                hint="run the requests together on the model: editor.run(requests)",
            )
        known = {entry.key for entry in self.held}
        fresh = tuple(entry for entry in other.held if entry.key not in known)
        wanted, held, price = self.wanted + other.wanted, self.held + fresh, self.price or other.price
        if price is not None:  # with the metric itself at hand no spreads are needed, and only some entries have any
            wanted = tuple(replace(entry, spread=None) for entry in wanted)
            held = tuple(replace(entry, spread=None) for entry in held)
        return replace(self, wanted=wanted, held=held, price=price)


def _told(marks: Sequence[float]) -> str:
    return ", ".join(f"{mark:.4g}" for mark in marks) or "none"


def check_contradictions(
    pairs: Pairs, names: Sequence[str], candidates: Iterable[tuple[int, int]] | None = None
) -> None:
    """Refuse two requests that want different values for one key: an average would satisfy neither.

    Args:
        pairs: of one site.
        names: the subject of each request, for the message.
        candidates: requests to compare, for a caller who knows which could share a key; default: those whose key spaces
            could share a direction (`diffedit.linalg.overlap`; its cost grows with the square of their number).

    Raises:
        ContradictionError: the key spaces of two requests share a direction and disagree on its value.
    """
    if len(pairs.wanted) != len(names):
        raise RequestError("pairs and requests do not match", value=f"{len(pairs.wanted)} and {len(names)}")
    if len(names) < 2:
        return
    if candidates is None:
        rows = torch.cat([entry.keys for entry in pairs.wanted])
        candidates = sharing(rows, [len(entry.keys) for entry in pairs.wanted])
    for a, b in candidates:
        if disagreement(pairs.wanted[a], pairs.wanted[b]) > DISAGREE:
            raise ContradictionError(
                "two subjects ask the same key for different values",
                value=f"{names[a]!r} and {names[b]!r}",
                hint="remove one of the two subjects, or give both the same target",
            )


def check_exclusion(before: Pairs, after: Pairs) -> None:
    """Refuse to drop preserved names whose prompts are part of the metric, as exact="preserve" makes them.

    Raises:
        NotComposableError: `before` holds a name that `after` does not.
    """
    freed = sorted({entry.name for entry in before.held} - {entry.name for entry in after.held})
    if freed:
        raise NotComposableError(
            "the edit excludes exactly what only the removed subject preserved",
            value=", ".join(freed[:5]),
            cause="with exact='preserve' the prompts of these names are part of the solve's metric",
            hint="run the remaining requests on the model again: editor.run(requests)",
        )


def main_keys(entries: Sequence[Wanted]) -> Tensor:
    """[len, d_in] float64 unit vectors: each request's strongest key direction."""
    main = []
    for entry in entries:
        keys = entry.keys.double()
        _, left = torch.linalg.eigh(keys @ keys.T)
        direction = left[:, -1] @ keys
        main.append(torch.nn.functional.normalize(direction * torch.sign(direction @ keys.sum(0)), dim=0))
    return torch.stack(main)


def disagreement(first: Wanted, second: Wanted) -> float:
    """How far two requests differ on the keys that both have: |gap| / |wanted|, 0 when they share no key."""
    q_a, q_b = _basis(first), _basis(second)
    if len(q_a) + len(q_b) > first.keys.shape[1]:
        return 0.0  # such spaces share directions whatever they hold
    left, cosine, right = torch.linalg.svd(q_a @ q_b.T)
    worst = 0.0
    for i in (cosine > 1 - _SAME).nonzero().flatten().tolist():
        wants = []
        for direction, entry in ((left[:, i] @ q_a, first), (right[i] @ q_b, second)):
            mix = torch.linalg.lstsq(entry.keys.double().T, direction[:, None], driver="gelsd").solution[:, 0]
            wants.append(mix @ entry.residuals.double())
        scale = max(float(torch.linalg.vector_norm(want)) for want in wants)
        apart = float(torch.linalg.vector_norm(wants[0] - wants[1]))
        worst = max(worst, apart / scale if scale > 0 else 0.0)
    return worst


def _joined(parts: list[Tensor]) -> Tensor:
    """All rows in float64, without a float32 copy of them on the way."""
    out = parts[0].new_empty(sum(map(len, parts)), parts[0].shape[1], dtype=torch.float64)
    return torch.cat(parts, out=out)


def _blocks(entries: Sequence[_Entry], rows: Callable[[_Entry], Tensor]) -> Iterator[Tensor]:
    """The rows of all entries in order, float64, at least `BLOCK` at a time but for the last."""
    parts: list[list[Tensor]] = []
    sizes: list[int] = []
    for entry in entries:
        if not sizes or sizes[-1] >= BLOCK:
            parts.append([])
            sizes.append(0)
        parts[-1].append(rows(entry))
        sizes[-1] += len(parts[-1][-1])
    if parts:
        memory = parts[0][0].new_empty(max(sizes), parts[0][0].shape[1], dtype=torch.float64)
        for part, size in zip(parts, sizes, strict=True):
            yield torch.cat(part, out=memory[:size])


def _basis(entry: Wanted) -> Tensor:
    """[r, d_in]: an orthonormal basis of the space that a request's keys span."""
    _, sigma, right = torch.linalg.svd(entry.keys.double(), full_matrices=False)
    basis: Tensor = right[sigma > 1e-6 * sigma[0]]
    return basis
