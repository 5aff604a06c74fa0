"""The numbers of a causal trace: what every run scored, and what follows from it.

    total effect     = Phi(clean) - Phi(corrupted)                   what the corruption takes away
    indirect effect  = Phi(restored) - Phi(corrupted)                what one state brings back, signed

Both are averaged over prompts and seeds, with bootstrap intervals (`statistics`). The paper scores a state by the
absolute indirect effect, or by Phi(restored) alone since Phi(corrupted) is common to all states; both are available as
orders (`absolute`, `raw`), but whether a state counts as causal is always decided by the signed effect: a state that
pushes the concept further away has a large absolute effect too.

The best of many states is picked by the same runs that measure it, so its effect is a little too good on average;
measure it again with other seeds before quoting it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from diffedit.errors import NoCausalSiteError
from diffedit.intervention import TEXT_ENCODER, Part
from diffedit.locators.states import windows
from diffedit.locators.statistics import Array, Bootstrap, Estimate
from diffedit.site import EditSite, Location, TokenRule

Effect = Literal["signed", "absolute", "raw"]


@dataclass(frozen=True, order=True)
class Unit:
    """One prompt with one seed: the noise and the starting latents both follow from the seed."""

    prompt: str
    subject: str
    seed: int


@dataclass(frozen=True)
class State:
    """One cell of a trace.

    Attributes:
        part: the first part of the restored window.
        column: the restored positions.
        effect: its indirect effect.
        share: indirect effect over total effect, of the means; 1 brings everything back.
    """

    part: Part
    column: str
    effect: Estimate
    share: float

    @property
    def causal(self) -> bool:
        """Whether the interval of the effect lies above zero."""
        return self.effect.positive


@dataclass(frozen=True, eq=False)
class TraceTable:
    """Scores of all runs.

    Attributes:
        component: what was traced.
        parts: rows; with a window, its first part.
        columns: columns; `whole` for a UNet, whose parts are restored at all positions.
        units: the runs behind every cell, sorted.
        clean: [u], Phi of the clean runs.
        corrupted: [u], Phi of the corrupted runs.
        restored: [u, p, c], Phi of the restored runs; NaN where a prompt has no such position.
        window: number of consecutive parts of one kind restored together.
        least_total_effect: mean total effect below which the corruption counts as having removed nothing.
    """

    component: str
    parts: tuple[Part, ...]
    columns: tuple[str, ...]
    units: tuple[Unit, ...]
    clean: Array
    corrupted: Array
    restored: Array
    window: int = 1
    least_total_effect: float = 0.0

    @cached_property
    def _bootstrap(self) -> Bootstrap:
        return Bootstrap([(unit.prompt, unit.subject) for unit in self.units])

    @cached_property
    def total_effect(self) -> Estimate:
        """Phi(clean) - Phi(corrupted)."""
        return self._bootstrap.estimate(self.clean - self.corrupted)

    @cached_property
    def states(self) -> tuple[State, ...]:
        """Every cell, part by part."""
        cells = self.restored - self.corrupted[:, None, None]
        mean, low, high, n = self._bootstrap.estimates(cells.reshape(len(self.units), -1))
        whole = self.total_effect.mean
        found = []
        for index, (m, lo, hi, count) in enumerate(zip(mean, low, high, n, strict=True)):
            part, column = divmod(index, len(self.columns))
            effect = Estimate(float(m), float(lo), float(hi), int(count))
            share = effect.mean / whole if whole else math.nan
            found.append(State(self.parts[part], self.columns[column], effect, share))
        return tuple(found)

    def scores(self, effect: Effect = "signed") -> Array:
        """[p, c], the number that orders the states: mean signed effect, mean absolute effect, or mean Phi."""
        change = self.restored - self.corrupted[:, None, None]
        values = {"signed": change, "absolute": np.abs(change), "raw": self.restored}[effect]
        mean, _, _, _ = self._bootstrap.estimates(values.reshape(len(self.units), -1))
        return mean.reshape(len(self.parts), len(self.columns))

    def check_total_effect(self) -> None:
        """Refuse to explain an effect that is not there.

        Raises:
            NoCausalSiteError: see its message.
        """
        total = self.total_effect
        if len(self.units) < 2:
            raise NoCausalSiteError(
                "a single run says nothing about chance", value="1 prompt, 1 seed", hint="trace more seeds or prompts"
            )
        if not total.positive or total.mean < self.least_total_effect:
            raise NoCausalSiteError(
                "the corruption did not remove the concept, so there is nothing to bring back",
                value=f"total effect {total}, at least {self.least_total_effect:g} is needed",
                cause="the noise is too small, the model does not know the subject, or the measure does not see it",
                hint="raise the noise, add prompts or seeds, or use another measure",
            )

    def best_state(self, effect: Effect = "signed", rules: Sequence[TokenRule] | None = None) -> State:
        """The causal state with the highest score, the first of equal ones.

        Args:
            effect: the order; the decision whether it is causal rests on the signed effect.
            rules: only states that an edit can reach: parts with edit sites, at one of these token rules.

        Raises:
            NoCausalSiteError: no state, or none whose interval lies above zero.
        """
        return self.best_states(1, effect, rules)[0]

    def best_states(
        self, count: int, effect: Effect = "signed", rules: Sequence[TokenRule] | None = None
    ) -> tuple[State, ...]:
        """At most `count` causal states, the best first, all at the best one's positions; no two share a part.

        Raises:
            NoCausalSiteError: see `best_state`.
        """
        self.check_total_effect()
        scores = self.scores(effect).reshape(-1)
        pool = [i for i, state in enumerate(self.states) if not np.isnan(scores[i])]
        pool = [i for i in pool if rules is None or self._editable(self.states[i], rules)]
        if not pool:
            raise NoCausalSiteError(
                "none of the traced states can be edited",
                value=f"{self.component}: {', '.join(dict.fromkeys(part.kind for part in self.parts))}",
                hint=f"trace self_attn, mlp or cross_attn at {', '.join(rules or TokenRule)}",
            )
        pool.sort(key=lambda i: (-scores[i], i))
        certain = [self.states[i] for i in pool if self.states[i].causal]
        if not certain:
            first = self.states[pool[0]]
            raise NoCausalSiteError(
                "no state brings the concept back for certain",
                value=f"first is {first.part.name} at {first.column}: {first.effect}",
                cause="no state's 95% interval lies above zero",
                hint="add prompts or seeds; the knowledge may also be spread over many states",
            )
        chosen: list[State] = []
        taken: set[Part] = set()
        for state in certain:
            members = set(self._members(state.part))
            if len(chosen) < count and state.column == certain[0].column and not members & taken:
                chosen.append(state)
                taken |= members
        return tuple(chosen)

    def locate(
        self,
        method: str,
        reference: str,
        effect: Effect = "signed",
        rules: Sequence[TokenRule] = tuple(TokenRule),
        count: int = 1,
    ) -> Location:
        """The best states that can be edited at one of the token rules, at most `count`, as a location."""
        chosen = self.best_states(count, effect, rules)
        best = chosen[0]
        rule = TokenRule(best.column) if best.column in tuple(TokenRule) else rules[0]
        scores = {site: state.effect.mean for state in chosen for site in self._sites(state.part)}
        return Location(tuple(sorted(scores)), rule, method, reference, tuple(scores[site] for site in sorted(scores)))

    def _members(self, part: Part) -> tuple[Part, ...]:
        return windows(self.parts, self.window)[self.parts.index(part)]

    def _sites(self, part: Part) -> tuple[EditSite, ...]:
        return tuple(sorted(site for member in self._members(part) for site in member.sites))

    def _editable(self, state: State, rules: Sequence[TokenRule]) -> bool:
        spoken = state.column in tuple(rules) or self.component != TEXT_ENCODER
        return spoken and all(member.sites for member in self._members(state.part))
