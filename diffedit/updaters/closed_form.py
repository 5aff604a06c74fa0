"""Diff-QuickFix: one regularised least-squares solve per site, no data, no training.

    min_W  sum_i s_i |W k_i - v_i|^2 + lam |W - W0|^2 + p sum_j |(W - W0) q_j|^2

Source: Basu et al. 2023 (arXiv 2310.13730), eq. 8 and 9, for the first two terms. `quickfix` differs from the
    released code in four points, each a setting: the bias counts once; only the subject tokens are paired, for
    end-of-text and padding positions carry every prompt's meaning and outnumber the subject 75 to 1; wanted values
    also replace the word's own embedding in the residual stream (`values="stream"`); other concepts can be
    preserved. `quickfix-published` restores the released behaviour.

The pairs that a solve starts from stay with its result (`Delta.pairs`): with them edits can be composed, taken apart
and scaled later, without the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field

from diffedit.delta import Delta, Diagnostics, LowRank
from diffedit.interfaces import Backend, Updater
from diffedit.linalg.gram import GRAM_FROM
from diffedit.linalg.solve import RidgeSolution, ridge_factors
from diffedit.pairs import Pairs
from diffedit.request import Request
from diffedit.site import EditSite, Location, Role
from diffedit.updaters.tokens import PairWeights
from diffedit.updaters.values import Recipe, ValueKind, key_values

FLOAT32_TOL = 1e-7
TAIL_WEIGHT = 0.3
PAIR_TOL = 0.05


class QuickFix(Updater):
    """The closed form with its defects mended.

    Attributes:
        lam: larger keeps the old weights and weakens the edit; keys of norm well above sqrt(lam) are fitted exactly.
        values: `stream` also cancels the source word's embedding after the layer, `module` leaves it (the paper).
        subject_weight: weight of the pairs that the location's token rule selects.
        eos_weight: weight of each pair after the subject, up to the end-of-text token. They close a leak (those
            positions read the subject's embedding by themselves, before the edit) but every prompt has them, so they
            disturb others unless those are preserved. Left out: 0.3 for objects if others are preserved, else 0.
        padding_weight: weight of each padding pair, which leaks the same way. Alone it is the first cause of collateral
            damage; beside preserved concepts, whose padding is held as well, it helps both sides. Left out: as above.
        preserve_weight: weight of each preserve key; larger holds them stiller at the cost of the edit.
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
    padding_weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    preserve_weight: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    pair_tol: float = Field(default=PAIR_TOL, ge=0, lt=1)

    _keep_bias: ClassVar[bool] = False

    def solve(self, backend: Backend, requests: Sequence[Request], location: Location) -> Delta:
        """One joint solve of all requests at each site of the location."""
        prepared = [self._prepared(request) for request in requests]
        weights = [self._weights(request) for request in prepared]
        recipe = Recipe(self.values, self.pair_tol, self._keep_bias)
        return self.solve_pairs(key_values(backend, prepared, location.sites, location.tokens, weights, recipe))

    def solve_pairs(self, pairs: Mapping[EditSite, Pairs]) -> Delta:
        """The same solve from pairs that were collected before."""
        factors: dict[EditSite, LowRank] = {}
        diagnostics: dict[EditSite, Diagnostics] = {}
        for site, data in pairs.items():
            factors[site], diagnostics[site] = self._solve_site(data)
        return Delta(factors, diagnostics, pairs)

    def _prepared(self, request: Request) -> Request:
        return request

    def _weights(self, request: Request) -> PairWeights:
        tail = TAIL_WEIGHT if request.preserve and request.kind == "object" else 0.0
        return PairWeights(
            self.subject_weight,
            tail if self.eos_weight is None else self.eos_weight,
            tail if self.padding_weight is None else self.padding_weight,
        )

    def _solve_site(self, data: Pairs) -> tuple[LowRank, Diagnostics]:
        keys, residuals, held = data.stack()
        still = held.new_full((held.shape[0],), self.preserve_weight)
        solution = ridge_factors(keys, residuals, lam=self.lam, preserve=held, preserve_weights=still)
        change = LowRank(solution.up, solution.down)
        if change.rank < GRAM_FROM:
            change = change.compress(FLOAT32_TOL)
        elif change.rank < min(change.shape):
            change = change.orthogonal()
        return change.to(torch.float32), diagnose(solution, change, data)


def diagnose(solution: RidgeSolution, change: LowRank, data: Pairs) -> Diagnostics:
    """What is reported of one site's solve."""
    return Diagnostics(
        condition=solution.condition,
        effective_rank=solution.effective_rank,
        residual=solution.residual,
        preserve_drift=solution.preserve_drift,
        relative_norm=change.norm() / data.weight_norm if data.weight_norm else float("inf"),
        pairs=sum(entry.count for entry in data.wanted),
        preserved=sum(entry.count for entry in data.held),
    )


class QuickFixPublished(QuickFix):
    """The released notebook's variant, for comparison: bias twice, every later position paired, four bare templates."""

    name = "quickfix-published"
    reference = "Basu et al. 2023, arXiv 2310.13730, as released (use_eos = 1, reg = 0.01)"
    preserves = False

    values: ValueKind = "module"
    eos_weight: float | None = Field(default=1.0, ge=0, allow_inf_nan=False)
    padding_weight: float | None = Field(default=1.0, ge=0, allow_inf_nan=False)
    pair_tol: float = Field(default=0.0, ge=0, lt=1)

    _keep_bias: ClassVar[bool] = True
    _templates: ClassVar[tuple[str, ...]] = ("{}", "photo of {}", "image of {}", "picture of {}")

    def _prepared(self, request: Request) -> Request:
        return request.model_copy(update={"templates": self._templates})
