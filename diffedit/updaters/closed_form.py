"""Diff-QuickFix: one regularised least-squares solve per site, no data, no training.

    min_W  sum_i s_i |W k_i - v_i|^2  +  p sum_j |D q_j|^2  +  t (lam |D|^2 + mu E|D k|^2),    D = W - W0

    subject to  D z = 0  for inputs z that must not change at all

The first term and lam are Basu et al. 2023 (arXiv 2310.13730), eq. 8 and 9. `quickfix` goes beyond the released code in
these points, each a setting:

    values, eos_weight ...   the bias counts once; only the subject tokens are paired unless others are held, for
                             end-of-text and padding positions carry every prompt's meaning and outnumber the subject
                             75 to 1; wanted values also replace the word's own embedding in the residual stream
    preserve_weight          p: named concepts are held (UCE's term)
    everyday_weight          mu: what everyday captions read is held, E over their tokens (MEMIT's term): protects what
                             nobody has named
    exact                    z: the begin-of-text token and the empty prompt, or also the preserved names, do not move
    give_up                  t: chosen automatically from the curve of efficacy against cost (`linalg.curve`)

`quickfix-published` restores the released behaviour.

The pairs that a solve starts from stay with its result (`Delta.pairs`): with them edits can be composed, taken apart
and scaled later, without the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffedit.delta import Delta, Diagnostics, LowRank
from diffedit.errors import NotComposableError, RequestError
from diffedit.interfaces import Backend, Updater
from diffedit.linalg.curve import TradeOff, from_metric, from_spread
from diffedit.linalg.metric import Metric
from diffedit.linalg.solve import RidgeSolution, ridge_factors, ridge_of_blocks
from diffedit.pairs import Pairs
from diffedit.request import Request, held_names
from diffedit.site import EditSite, Location, Role
from diffedit.updaters.everyday import everyday_metric
from diffedit.updaters.layers import in_turn
from diffedit.updaters.tokens import PairWeights
from diffedit.updaters.values import Recipe, ValueKind, key_values

TAIL_WEIGHT, TAIL_WEIGHT_SPREAD = 0.3, 1.0
PAIR_TOL = 0.05
CAPTIONS = 300
EVERYDAY_WEIGHT = 1e4
GIVE_UP, GIVE_UP_HELD = 0.15, 0.1


class QuickFix(Updater):
    """The closed form with its defects mended.

    Attributes:
        lam: larger keeps the old weights and weakens the edit; keys of norm well above sqrt(lam) are fitted exactly.
        values: `stream` also cancels the source word's embedding after the layer, `module` leaves it (the paper).
        subject_weight: weight of the pairs that the location's token rule selects.
        eos_weight: weight of each pair after the subject, up to the end-of-text token. They close a leak (those
            positions read the subject's embedding by themselves, before the edit) but every prompt has them, so they
            disturb others unless those are held. Left out: for objects, if anything is held, 0.3 at one site and 1 at
            several, for later layers have read the subject there; else 0.
        padding_weight: weight of each padding pair. They leak in the same way, but are many: holding what they say
            costs far more time and larger files, and has shown no gain beside `eos_weight`.
        preserve_weight: weight of each preserve key; larger holds them stiller at the cost of the edit.
        everyday: everyday captions behind the second moment, which is measured once per model; 0 leaves the term out.
        everyday_weight: weight of the mean over their tokens; larger protects everything else more.
        exact: what may not change at all: `none`; `empty`, the begin-of-text token and the empty prompt, of which
            classifier-free guidance is made; `preserve`, these and the preserved names' prompts up to the end of text.
        give_up: share of what the edit could reach that it may lose to lam and everyday_weight: both are multiplied by
            the largest factor that keeps to it. Larger protects more. `auto`: 0.1 beside preserved names, which are
            held already, else 0.15. `None` takes lam and everyday_weight as they are.
        pair_tol: prompts around one subject ask for nearly the same; what differs by less than this share is left out.
            Larger makes smaller files, 0 keeps one row for each pair.
    """

    name = "quickfix"
    reference = "Basu et al. 2023, arXiv 2310.13730, Diff-QuickFix"
    roles: ClassVar[tuple[Role, ...]] = (Role.TEXT_SELF_ATTN_OUT, Role.TEXT_MLP_OUT)
    preserves = True

    lam: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    values: ValueKind = "stream"
    subject_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    eos_weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    padding_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    preserve_weight: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    everyday: int = Field(default=CAPTIONS, ge=0)
    everyday_weight: float = Field(default=EVERYDAY_WEIGHT, gt=0, allow_inf_nan=False)
    exact: Literal["none", "empty", "preserve"] = "none"
    give_up: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] | None = "auto"
    pair_tol: float = Field(default=PAIR_TOL, ge=0, lt=1)

    _keep_bias: ClassVar[bool] = False

    @model_validator(mode="after")
    def _has_ridge(self) -> QuickFix:
        if self.lam == 0 and self._priced:
            raise RequestError(
                "lam = 0 leaves some changes without a price",
                value=f"everyday={self.everyday}, exact={self.exact!r}, give_up={self.give_up}",
                hint="use a small lam, or everyday=0, exact='none' and give_up=None",
            )
        return self

    @property
    def in_blocks(self) -> bool:
        """Except where lam = 0 needs all rows at once."""
        return self._priced or self.lam > 0

    @property
    def _priced(self) -> bool:
        """Whether the solve is made in a metric of its own."""
        return self.everyday > 0 or self.exact != "none" or self.give_up is not None

    def solve(self, backend: Backend, requests: Sequence[Request], location: Location) -> Delta:
        """One joint solve of all requests at each site of the location, in the order in which the sites run.

        Several sites share the work: each reads the subject under the changes before it, and takes its part of what is
        then missing to the unedited target (`layers.in_turn`). With values="module" each site has values of its own,
        and writes all of them.

        Raises:
            IllConditionedError: what must not change at all leaves nothing to edit.
        """
        prepared = [self._prepared(request) for request in requests]
        turns = in_turn(location.sites) if self.values == "stream" else [dict.fromkeys(location.sites, 1.0)]
        weights = [self._weights(request, len(turns) > 1) for request in prepared]
        if len(turns) == 1:
            return self.solve_pairs(self._pairs(backend, prepared, weights, location, turns[0], {}))
        plain = [request.model_copy(update={"strength": 1.0}) for request in prepared]
        whole = Delta({})
        for shares in turns:
            part = self.solve_pairs(self._pairs(backend, plain, weights, location, shares, whole.factors))
            whole = Delta(
                {**whole.factors, **part.factors},
                {**whole.diagnostics, **part.diagnostics},
                {**whole.pairs, **part.pairs},
            )
        if prepared == plain:
            return whole
        strengths = [request.strength for request in prepared]
        return self.solve_pairs({site: data.scale(strengths) for site, data in whole.pairs.items()})

    def _pairs(
        self,
        backend: Backend,
        requests: Sequence[Request],
        weights: Sequence[PairWeights],
        location: Location,
        shares: Mapping[EditSite, float],
        before: Mapping[EditSite, LowRank],
    ) -> dict[EditSite, Pairs]:
        """The pairs of the sites of one turn, under the changes made before."""
        recipe = Recipe(self.values, self.pair_tol, self._keep_bias, shares, before)
        pairs = key_values(backend, requests, sorted(shares), location.tokens, weights, recipe)
        if not self._priced:
            return pairs
        return {site: data.measured(self.metric(backend, site, requests)) for site, data in pairs.items()}

    def solve_pairs(self, pairs: Mapping[EditSite, Pairs]) -> Delta:
        """The same solve from pairs that were collected before."""
        factors: dict[EditSite, LowRank] = {}
        diagnostics: dict[EditSite, Diagnostics] = {}
        for site, data in pairs.items():
            solution, factor = self._in_metric(data) if data.metric else self._plain(data)
            factors[site] = LowRank(solution.up, solution.down).thin()
            diagnostics[site] = diagnose(solution, factors[site], data, factor)
        return Delta(factors, diagnostics, pairs)

    def metric(self, backend: Backend, site: EditSite, requests: Sequence[Request] = ()) -> Metric:
        """What a change of the site costs; see the module's text.

        Args:
            backend: the model.
            site: where.
            requests: whose preserved names must not move, for exact="preserve".
        """
        price = everyday_metric(backend, site, self.everyday, self.lam, self.everyday_weight)
        if self.exact == "none":
            return price
        still = [backend.capture([""], [site], padded=True).inputs[site][0].double()]
        if self.exact == "preserve":
            still += _prompt_inputs(backend, site, requests)
        return price.exclude(torch.cat(still))

    def trade_off(self, pairs: Pairs) -> TradeOff:
        """What each factor t would reach and cost at one site.

        Raises:
            RequestError: the edit is not solved in a metric.
            NotComposableError: the pairs lack both their spreads and the metric.
        """
        if not pairs.metric:
            raise RequestError("the edit has no trade-off", cause="it was solved with everyday=0 and give_up=None")
        root_weight = self.preserve_weight**0.5
        if pairs.price is not None:
            return from_metric(pairs.blocks(), pairs.held_blocks(root_weight), pairs.price)
        keys, residuals, held = pairs.stack()
        rows = torch.cat([keys, root_weight * held])
        spread = pairs.spreads()
        if spread is None:
            raise NotComposableError("the pairs say not in which metric they were solved", value=pairs.metric)
        spread[len(keys) :] *= root_weight
        return from_spread(rows, residuals, spread)

    def factor(self, pairs: Pairs, curve: TradeOff) -> float:
        """What lam and everyday_weight are multiplied by at one site."""
        if self.give_up is None:
            return 1.0
        automatic = GIVE_UP_HELD if pairs.held else GIVE_UP
        return curve.choose(automatic if self.give_up == "auto" else self.give_up)

    def _plain(self, data: Pairs) -> tuple[RidgeSolution, float]:
        if sum(len(entry.keys) for entry in data.wanted) >= data.wanted[0].keys.shape[1]:
            found = ridge_of_blocks(data.blocks, partial(data.held_blocks, self.preserve_weight**0.5), lam=self.lam)
            if found is not None:
                return found, 1.0
        keys, residuals, held = data.stack()
        still = held.new_full((held.shape[0],), self.preserve_weight)
        return ridge_factors(keys, residuals, lam=self.lam, preserve=held, preserve_weights=still), 1.0

    def _in_metric(self, data: Pairs) -> tuple[RidgeSolution, float]:
        curve = self.trade_off(data)
        factor = self.factor(data, curve)
        up, down = curve.solve(factor)
        missed, moved = (part / curve.wanted if curve.wanted else 0.0 for part in curve.undone(factor))
        rank = int((curve.energies > torch.finfo(torch.float64).eps * len(curve.energies) * curve.energies[-1]).sum())
        return RidgeSolution(up, down, curve.condition(factor), rank, missed, moved), factor

    def _prepared(self, request: Request) -> Request:
        return request

    def _weights(self, request: Request, spread: bool) -> PairWeights:
        held = bool(request.preserve) or self.everyday > 0
        weight = TAIL_WEIGHT_SPREAD if spread else TAIL_WEIGHT
        tail = weight if held and request.kind == "object" else 0.0
        eos = tail if self.eos_weight is None else self.eos_weight
        return PairWeights(self.subject_weight, eos, self.padding_weight)


def _prompt_inputs(backend: Backend, site: EditSite, requests: Sequence[Request]) -> list[Tensor]:
    """The inputs [t, d_in] of every preserved prompt, from the begin-of-text token to the end of text."""
    phrases = dict.fromkeys(
        (prompt, name, at) for request, name in held_names(requests) for prompt, at in request.render(name)
    )
    if not phrases:
        return []
    spans = backend.spans(list(phrases))
    inputs = backend.capture([span.prompt for span in spans], [site]).inputs[site].double()
    return [inputs[row, : span.eos + 1] for row, span in enumerate(spans)]


def diagnose(solution: RidgeSolution, change: LowRank, data: Pairs, factor: float = 1.0) -> Diagnostics:
    """What is reported of one site's solve."""
    return Diagnostics(
        condition=solution.condition,
        effective_rank=solution.effective_rank,
        residual=solution.residual,
        preserve_drift=solution.preserve_drift,
        relative_norm=change.norm() / data.weight_norm if data.weight_norm else float("inf"),
        pairs=sum(entry.count for entry in data.wanted),
        preserved=sum(entry.count for entry in data.held),
        factor=factor,
    )


class QuickFixPublished(QuickFix):
    """The released notebook's variant, for comparison: bias twice, every later position paired, four bare templates."""

    name = "quickfix-published"
    reference = "Basu et al. 2023, arXiv 2310.13730, as released (use_eos = 1, reg = 0.01)"
    preserves = False

    values: ValueKind = "module"
    eos_weight: float | None = Field(default=1.0, ge=0, allow_inf_nan=False)
    padding_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    everyday: int = Field(default=0, ge=0)
    give_up: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] | None = None
    pair_tol: float = Field(default=0.0, ge=0, lt=1)

    _keep_bias: ClassVar[bool] = True
    _templates: ClassVar[tuple[str, ...]] = ("{}", "photo of {}", "image of {}", "picture of {}")

    def _prepared(self, request: Request) -> Request:
        return request.model_copy(update={"templates": self._templates})
