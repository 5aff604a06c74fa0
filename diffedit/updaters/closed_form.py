"""Diff-QuickFix: one regularised least-squares solve per site, no data, no training.

    min_W  sum_i s_i |W k_i - v_i|^2 + lam |W - W0|^2 + p sum_j |(W - W0) q_j|^2

Source: Basu et al. 2023 (arXiv 2310.13730), eq. 8 and 9, for the first two terms. `quickfix` differs from the
    released code in four points, each a setting: the bias counts once; only the subject tokens are paired, for
    end-of-text and padding positions carry every prompt's meaning and outnumber the subject 75 to 1; wanted values
    also replace the word's own embedding in the residual stream (`values="stream"`); other concepts can be
    preserved. `quickfix-published` restores the released behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from diffedit.delta import Delta, Diagnostics, LowRank
from diffedit.interfaces import Backend, Updater
from diffedit.linalg.solve import ridge_factors
from diffedit.request import Request
from diffedit.site import EditSite, Location, Role
from diffedit.updaters.values import KeyValues, PairWeights, ValueKind, key_values

FLOAT32_TOL = 1e-7
EOS_WEIGHT = 0.1


class QuickFix(Updater):
    """The closed form with its defects mended.

    Attributes:
        lam: larger keeps the old weights and weakens the edit; keys of norm well above sqrt(lam) are fitted exactly.
        values: `stream` also cancels the source word's embedding after the layer, `module` leaves it (the paper).
        subject_weight: weight of the pairs that the location's token rule selects.
        eos_weight: weight of the end-of-text pair. It closes a leak (that position reads the subject's embedding by
            itself, before the edit) but every prompt ends there, so it disturbs others unless they are preserved. Left
            out: 0.1 for objects if others are preserved, else 0.
        padding_weight: weight of each padding pair; strong, and the first cause of collateral damage.
        preserve_weight: weight of each preserve key; larger holds them stiller at the cost of the edit.
    """

    name = "quickfix"
    reference = "Basu et al. 2023, arXiv 2310.13730, Diff-QuickFix"
    roles: ClassVar[tuple[Role, ...]] = (Role.TEXT_SELF_ATTN_OUT, Role.TEXT_MLP_OUT)

    lam: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    values: ValueKind = "stream"
    subject_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    eos_weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    padding_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    preserve_weight: float = Field(default=0.1, ge=0, allow_inf_nan=False)

    _keep_bias: ClassVar[bool] = False

    def solve(self, backend: Backend, requests: Sequence[Request], location: Location) -> Delta:
        """One joint solve of all requests at each site of the location."""
        eos_weight = self.eos_weight
        if eos_weight is None:
            held = all(request.preserve and request.kind == "object" for request in requests)
            eos_weight = EOS_WEIGHT if held else 0.0
        weights = PairWeights(self.subject_weight, eos_weight, self.padding_weight)
        pairs = key_values(
            backend,
            [self._prepared(request) for request in requests],
            location.sites,
            location.tokens,
            weights=weights,
            kind=self.values,
            keep_bias=self._keep_bias,
        )
        factors: dict[EditSite, LowRank] = {}
        diagnostics: dict[EditSite, Diagnostics] = {}
        for site, data in pairs.items():
            factors[site], diagnostics[site] = self._solve_site(backend, site, data)
        return Delta(factors, diagnostics)

    def _prepared(self, request: Request) -> Request:
        return request

    def _solve_site(self, backend: Backend, site: EditSite, data: KeyValues) -> tuple[LowRank, Diagnostics]:
        solution = ridge_factors(
            data.keys,
            data.values - data.current,
            lam=self.lam,
            weights=data.weights,
            preserve=data.preserve,
            preserve_weights=self.preserve_weight * data.preserve_weights,
        )
        change = LowRank(solution.up, solution.down).compress(FLOAT32_TOL)
        norm = float(torch.linalg.vector_norm(backend.weight(site).detach(), dtype=torch.float64))
        return change.to(torch.float32), Diagnostics(
            condition=solution.condition,
            effective_rank=solution.effective_rank,
            residual=solution.residual,
            preserve_drift=solution.preserve_drift,
            relative_norm=change.norm() / norm,
            pairs=data.keys.shape[0],
            preserved=data.preserve.shape[0],
        )


class QuickFixPublished(QuickFix):
    """The released notebook's variant, for comparison: bias twice, every later position paired, four bare templates."""

    name = "quickfix-published"
    reference = "Basu et al. 2023, arXiv 2310.13730, as released (use_eos = 1, reg = 0.01)"

    values: ValueKind = "module"
    eos_weight: float | None = Field(default=1.0, ge=0, allow_inf_nan=False)
    padding_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    _keep_bias: ClassVar[bool] = True
    _templates: ClassVar[tuple[str, ...]] = ("{}", "photo of {}", "image of {}", "picture of {}")

    def _prepared(self, request: Request) -> Request:
        return request.model_copy(update={"templates": self._templates})
