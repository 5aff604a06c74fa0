"""EMCID: a concept's states are moved by gradients, and the move is written into the MLPs of many layers at once.

    1. delta_i = argmin c |E(delta) - E*|^2 / d + s |eps(delta) - eps*|^2 / n + decay |delta| / |h|^2    (`steering`)
    2. v*_i = h_i + delta_i, written by one ridge solve per layer, for all concepts together             (`spread`)

h_i is the hidden state after the last layer of the location at the concept's last token, delta_i the same in all
prompts of the concept. E is the encoder's summary of a prompt (its end-of-text state), E* that of the same prompt with
the target; eps is what the UNet predicts at noised pictures (`finetune.distil`), which costs a UNet pass forth and back
per step. With `noise_weight=0` the text alone is matched and no UNet is needed: much faster, and much weaker where
later tokens have read the subject before the last layer of the location, for E then hears little of delta.

Source: Xiong et al. 2024 (EMCID, arXiv 2403.13807); stage 2 is that of MEMIT (Meng et al. 2023, arXiv 2210.07229).
    Settings: learning rate 0.2, 100 steps, clamp 1.5, decay 5e-4, c = 0.01, s = 1, moment weight 4000, edit weight 0.6.
Differs: the released code takes what is missing as the difference between a whole layer's state and the output of the
    MLP that is being edited, two things that differ by the residual stream; here both are states after the last layer,
    as MEMIT defines it. h is the mean over the prompts where the code takes the first one's. Pictures are kept as the
    latents that were sampled, not decoded and encoded again. The moment comes from bundled captions, with a ridge, not
    from 100,000 of an image data set. Preserved names, if the request has any, enter every layer's solve.
Limits: seconds to minutes; what was found is not kept, so such edits do not compose; models with two text encoders are
    refused. Each layer has a second moment of its own: `cache_dir` keeps them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from diffedit.delta import FLOAT32_TOL, Delta, Diagnostics, LowRank
from diffedit.errors import RequestError
from diffedit.interfaces import Backend, Updater
from diffedit.linalg.solve import RidgeSolution
from diffedit.request import Request, held_names
from diffedit.site import EditSite, Location, Role, TokenRule
from diffedit.updaters.everyday import second_moment
from diffedit.updaters.finetune.distil import NoiseMatch
from diffedit.updaters.spread import Balance, Concept, mean_states, spread
from diffedit.updaters.steering import Aim, Descent, Fact, Steering, Understood, check_one_encoder

logger = logging.getLogger("diffedit")

_NEAR = 0.5


class EMCID(Updater):
    """An edit of the MLPs of several layers, with optimised states.

    Attributes:
        steps: gradient steps per subject.
        learning_rate: of Adam; larger arrives sooner and overshoots.
        text_weight: c, of the distance between the prompts' summaries.
        noise_weight: s, of the distance between predicted noises; 0 leaves the UNet alone.
        decay: larger keeps the change small.
        clamp: largest change in units of the present state.
        edit_weight: share of the edit against everyday prompts in each solve, in (0, 1]; larger writes more of it.
        moment_weight: weight of the second moment; larger protects everyday prompts and weakens the edit.
        preserve_weight: of each preserved name in each solve; the paper has none.
        captions: everyday captions behind the second moments; more protect more.
        moment_ridge: share of the mean eigenvalue added to a second moment; larger keeps the change out of directions
            that no caption uses.
        pictures: that the model makes of each subject (`noise_weight` only).
        picture_guidance: guidance scale they are sampled with.
        sampling_steps: their denoising steps; default: the model's own.
        cache_dir: folder in which second moments are kept, found again by the model's content; default: none. It is no
            part of the edit.
    """

    name = "emcid"
    reference = "Xiong et al. 2024, arXiv 2403.13807, EMCID; MEMIT: Meng et al. 2023, arXiv 2210.07229"
    roles = (Role.TEXT_MLP_OUT,)
    locator = "text-mlp-range"

    steps: int = Field(default=100, ge=1)
    learning_rate: float = Field(default=0.2, gt=0, allow_inf_nan=False)
    text_weight: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    noise_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    decay: float = Field(default=5e-4, ge=0, allow_inf_nan=False)
    clamp: float = Field(default=1.5, gt=0, allow_inf_nan=False)
    edit_weight: float = Field(default=0.6, gt=0, le=1)
    moment_weight: float = Field(default=4000.0, ge=0, allow_inf_nan=False)
    preserve_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    captions: int = Field(default=1000, ge=1)
    moment_ridge: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    pictures: int = Field(default=8, ge=1)
    picture_guidance: float = Field(default=7.5, allow_inf_nan=False)
    sampling_steps: int | None = Field(default=None, ge=1)
    cache_dir: Path | None = Field(default=None, exclude=True)

    def solve(self, backend: Backend, requests: Sequence[Request], location: Location) -> Delta:
        """All requests, in all layers of the location.

        Raises:
            RequestError: sites of other tokens, a request without a target, or nothing to match.
            NoOpError: subject and target mean the same to the encoder already.
            UnsupportedModelError: the model has two text encoders.
        """
        if location.tokens is not TokenRule.LAST_SUBJECT:
            raise RequestError(
                "emcid edits at the last token of the subject", value=location.tokens, hint="use text-mlp-range"
            )
        if not self.text_weight and not self.noise_weight:
            raise RequestError("there is nothing to match", value="text_weight and noise_weight are 0")
        check_one_encoder(backend, self.name)
        sites = sorted(location.sites, key=lambda site: site.layer)  # as strings, layers.10 sorts before layers.2
        steering = Steering(backend, sites[-1], padded=self.noise_weight > 0)
        concepts, targets = [], []
        for request in requests:
            for name in request.names:
                fact = steering.fact(request, name)
                concepts.append(Concept(fact.prompts, fact.positions))
                targets.append(self._state(backend, steering, sites[-1], request, fact))
        roots = {
            site: second_moment(backend, site, self.captions, self.cache_dir).root(self.moment_ridge) for site in sites
        }
        balance = Balance(self.edit_weight, self.moment_weight, self.preserve_weight)
        kept = _preserved(backend, requests)
        solved = spread(backend, sites, concepts, torch.stack(targets), kept, roots, balance)
        factors = {site: LowRank(found.up, found.down).compress(FLOAT32_TOL) for site, found in solved.items()}
        said = {
            site: _diagnostics(backend, site, found, factors[site], len(concepts), len(kept))
            for site, found in solved.items()
        }
        return Delta({site: change.to(torch.float32) for site, change in factors.items()}, said)

    def _state(self, backend: Backend, steering: Steering, last: EditSite, request: Request, fact: Fact) -> Tensor:
        """[d], v* of one name."""
        concept = Concept(fact.prompts, fact.positions)
        present = mean_states(backend, [concept], last, last)[1][0]
        how = Descent(self.steps, self.learning_rate, self.decay, self.clamp)
        aim = self._aim(backend, fact, request.seed)
        search = steering.descend(fact.prompts, fact.positions, aim, float(present.norm()), how)
        if not self.noise_weight and search.after < _NEAR:
            logger.warning(
                "emcid: after %d steps %r has come %.0f%% of the way to %r; match the noise as well (noise_weight=1), "
                "end at an earlier layer (locator text-mlp-range), or take more steps or a larger clamp",
                *(search.steps, fact.name, 100 * search.after, fact.target),
            )
        return present + search.delta.to(present) * request.strength

    def _aim(self, backend: Backend, fact: Fact, seed: int) -> Aim:
        """The loss, and the share of the way from the prompts' summaries to their goals."""
        way = float((fact.wanted - fact.present).square().mean().sqrt())
        noise = None
        if self.noise_weight:
            noise = NoiseMatch(
                backend,
                fact.prompts,
                fact.goals,
                pictures=self.pictures,
                guidance=self.picture_guidance,
                steps=self.sampling_steps,
                seed=seed,
            )

        def aim(seen: Understood) -> tuple[Tensor, float]:
            apart = (seen.summaries - fact.wanted.to(seen.summaries)).square().mean()
            loss = self.text_weight * apart
            if noise is not None:
                loss = loss + self.noise_weight * noise(seen.states)
            return loss, 1.0 - float(apart.detach().sqrt()) / way

        return aim


def _preserved(backend: Backend, requests: Sequence[Request]) -> list[Concept]:
    kept = {
        (name.casefold(), request.templates): (name, request.render(name)) for request, name in held_names(requests)
    }
    found = []
    for name, rendered in kept.values():
        spans = backend.spans([(prompt, name, at) for prompt, at in rendered])
        found.append(Concept(tuple(prompt for prompt, _ in rendered), tuple(span.last for span in spans)))
    return found


def _diagnostics(
    backend: Backend, site: EditSite, found: RidgeSolution, change: LowRank, pairs: int, preserved: int
) -> Diagnostics:
    norm = float(torch.linalg.vector_norm(backend.weight(site).detach(), dtype=torch.float64))
    return Diagnostics(
        condition=found.condition,
        effective_rank=found.effective_rank,
        residual=found.residual,
        preserve_drift=found.preserve_drift,
        relative_norm=change.norm() / norm if norm else float("inf"),
        pairs=pairs,
        preserved=preserved,
    )
