"""ReFACT: one layer of the text encoder gets one new fact, and everyday prompts barely notice.

    k = mean_i k_i              [d_in]   what the layer reads at the subject's last token, over the prompts
    v* = W k + delta            [d_out]  what it should write there, found by gradients (`steering`)
    D = delta (C^-1 k)^T / (k^T C^-1 k)

C is the second moment of the layer's inputs over everyday captions: of all changes that write v* for k, D moves
everyday outputs least. Several facts at once meet all demands exactly, K D^T = R, still with the least effect
(`linalg.moments`); the published method edits one at a time. An alias is a fact of its own.

Source: Arad et al. 2024 (ReFACT, arXiv 2306.00738), after Meng et al. 2022 (ROME, arXiv 2202.05262). Settings: learning
    rate 0.05, 100 steps, stop at 0.99, 20 negatives, clamp 4, decay 0.1; layer 7 of 12 for facts.
Differs: the moment comes from a thousand bundled captions, not from 100,000 of Wikipedia, with a ridge; delta is
    measured from the mean key where the released code scales by one prompt's key; negatives are the preserved names,
    then everyday captions; encoders without a projection are read before it.
Limits: one pass per step through the encoder and back, so seconds to minutes; what was found is not kept, so such edits
    do not compose; models with two text encoders are refused, since neither alone says what the prompt means. In a late
    layer the subject may have been read by others already, and no delta reaches the target: that is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from diffedit.delta import FLOAT32_TOL, Delta, Diagnostics, LowRank
from diffedit.errors import RequestError
from diffedit.interfaces import Backend, Updater
from diffedit.linalg.moments import constrained_factors
from diffedit.request import Request
from diffedit.site import EditSite, Location, Role, TokenRule
from diffedit.updaters.everyday import captions, second_moment
from diffedit.updaters.steering import Descent, Steering, check_one_encoder

logger = logging.getLogger("diffedit")

_LIKELY = 0.5


class ReFACT(Updater):
    """A rank-one edit of an MLP, with an optimised value.

    Attributes:
        steps: most gradient steps per subject.
        learning_rate: of Adam; larger arrives sooner and overshoots.
        enough: stop at this probability of the target among the negatives.
        decay: larger keeps the change small.
        clamp: largest change in units of what the layer writes now.
        temperature: distances are divided by it; smaller makes the search content with less.
        negatives: at most so many meanings that the subject must not get: preserved names, then everyday captions.
        captions: everyday captions behind the second moment; more protect more.
        moment_ridge: share of the mean eigenvalue added to the second moment; larger keeps the change out of directions
            that no caption uses, and spreads it over those they do use.
        cache_dir: folder in which second moments are kept, found again by the model's content; default: none. It is no
            part of the edit.
    """

    name = "refact"
    reference = "Arad et al. 2024, arXiv 2306.00738, ReFACT; ROME: Meng et al. 2022, arXiv 2202.05262"
    roles = (Role.TEXT_MLP_OUT,)
    locator = "text-mlp"
    preserves = True

    steps: int = Field(default=100, ge=1)
    learning_rate: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    enough: float = Field(default=0.99, gt=0, lt=1)
    decay: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    clamp: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    negatives: int = Field(default=20, ge=0)
    captions: int = Field(default=1000, ge=1)
    moment_ridge: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    cache_dir: Path | None = Field(default=None, exclude=True)

    def solve(self, backend: Backend, requests: Sequence[Request], location: Location) -> Delta:
        """All requests at the location's one site.

        Raises:
            RequestError: several sites, or a request without a target.
            NoOpError: subject and target mean the same to the encoder already.
            UnsupportedModelError: the model has two text encoders.
        """
        if len(location.sites) != 1 or location.tokens is not TokenRule.LAST_SUBJECT:
            raise RequestError(
                "refact edits one layer at the last token of the subject",
                value=f"{len(location.sites)} sites, tokens {location.tokens}",
                hint="use the locator text-mlp",
            )
        (site,) = location.sites
        check_one_encoder(backend, self.name)
        steering = Steering(backend, site)
        found = [self._demand(backend, steering, site, request, name) for request in requests for name in request.names]
        keys, deltas = torch.stack([key for key, _ in found]), torch.stack([delta for _, delta in found])
        root = second_moment(backend, site, self.captions, self.cache_dir).root(self.moment_ridge)
        solution = constrained_factors(keys, deltas, root.to(keys.device))
        change = LowRank(solution.up, solution.down).compress(FLOAT32_TOL)
        missed = deltas - keys @ solution.down.T @ solution.up.T
        norm = float(torch.linalg.vector_norm(backend.weight(site).detach(), dtype=torch.float64))
        said = Diagnostics(
            condition=solution.condition,
            effective_rank=len(keys),
            residual=float(torch.linalg.vector_norm(missed) / torch.linalg.vector_norm(deltas)),
            preserve_drift=0.0,
            relative_norm=change.norm() / norm if norm else float("inf"),
            pairs=len(keys),
            preserved=0,
        )
        return Delta({site: change.to(torch.float32)}, {site: said})

    def _demand(
        self, backend: Backend, steering: Steering, site: EditSite, request: Request, name: str
    ) -> tuple[Tensor, Tensor]:
        """One name's key [d_in] and delta [d_out], float64."""
        fact = steering.fact(request, name)
        how = Descent(self.steps, self.learning_rate, self.decay, self.clamp, self.temperature, self.enough)
        others = self._negatives(request)
        far = steering.summaries(others) if others else fact.wanted[:0]
        search = steering.find(fact.prompts, fact.positions, fact.wanted, far, how)
        if search.after < _LIKELY:
            logger.warning(
                "refact: after %d steps %r means %r with probability %.2g only (%.2g before); "
                "try another layer (locator text-mlp), more steps or a larger clamp",
                *(search.steps, name, fact.target, search.after, search.before),
            )
        inputs = backend.capture(fact.prompts, [site]).inputs[site].double()
        key = torch.stack([inputs[row, position] for row, position in enumerate(fact.positions)]).mean(0)
        return key, search.delta * request.strength

    def _negatives(self, request: Request) -> list[str]:
        kept = [request.render(name)[0][0] for name in request.preserve][: self.negatives]
        return kept + list(islice(captions(), self.negatives - len(kept)))
