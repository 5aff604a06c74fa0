"""Concept ablation, model-based: on pictures of the anchor, predict for the concept what is predicted for the anchor.

    |eps_theta(x_t, c) - sg eps_theta(x_t, c*)|^2  +  w |eps_theta(x_t, c*) - eps|^2,      x_t = noised anchor picture

with c the concept's prompt, c* the same prompt with the anchor (the request's target), sg: no gradient. The anchor's
pictures are made by the model itself before training starts, and kept as latents: no VAE, no data.

Source: Kumari et al. 2023 (arXiv 2303.13516) and the authors' diffusers code: keys and values of the UNet's
    cross-attention; 200 steps of batch 8 at 1.6e-5 on one GPU (2e-6 scaled by the batch), gradients clipped at 1, 200
    pictures of 50 sampling steps at guidance 6. `prior_weight` is the code's optional prior preservation.
Differs: Adam without weight decay; prompts are the request's templates, where the paper asks a language model for 200;
    no augmentation; 32 pictures by default, since they are most of the time on a small machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffedit.interfaces import Backend
from diffedit.request import Request
from diffedit.site import Role
from diffedit.updaters.finetune.anchors import Anchors
from diffedit.updaters.finetune.base import FineTune, prompts_of, target_of
from diffedit.updaters.finetune.noise import Lesson, NoiseObjective
from diffedit.updaters.finetune.scratch import Scratch


class ConceptAblation(FineTune):
    """Concept ablation, model-based, on the keys and values of the UNet's cross-attention.

    Attributes:
        anchors: pictures of the anchors that the model makes of itself, in all; more vary more and take longer.
        anchor_guidance: guidance scale they are sampled with.
        sampling_steps: their denoising steps; default: the model's own (50 for Stable Diffusion).
        teacher: whose prediction for the anchor is the aim: the `trained` model's (the paper) or the `original`'s,
            which cannot drift.
        prior_weight: w above; holds the anchor itself.
    """

    name = "concept-ablation"
    reference = "Kumari et al. 2023, arXiv 2303.13516, model-based, cross-attention"
    roles: ClassVar[tuple[Role, ...]] = (Role.UNET_CROSS_ATTN_K, Role.UNET_CROSS_ATTN_V)
    locator: ClassVar[str] = "cross-attention"

    learning_rate: float = Field(default=1.6e-5, ge=0, allow_inf_nan=False)
    batch_size: int = Field(default=8, ge=1)
    clip_norm: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    anchors: int = Field(default=32, ge=1)
    anchor_guidance: float = Field(default=6.0, allow_inf_nan=False)
    sampling_steps: int | None = Field(default=None, ge=1)
    teacher: Literal["trained", "original"] = "trained"
    prior_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    def objective(self, backend: Backend, requests: Sequence[Request], room: Scratch) -> NoiseObjective:
        """The concept read as its anchor."""
        return _Anchored(self, backend, requests, room)


class _Anchored(NoiseObjective):
    def __init__(self, settings: ConceptAblation, backend: Backend, requests: Sequence[Request], room: Scratch) -> None:
        super().__init__(
            backend, requests, room, settings.batch_size, settings.preserve_weight, settings.sampling_steps
        )
        self._settings = settings
        prompts = [
            prompt for request in requests for _ in request.names for prompt in prompts_of(request, target_of(request))
        ]
        with torch.no_grad():
            texts = self.denoiser.embed(prompts)  # row i is row i of the subjects, with the anchor in its place
        self._anchors = Anchors(self.denoiser, texts, settings.anchors, settings.anchor_guidance, requests[0].seed)

    def prepare(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Make the anchors' pictures, or take them from a checkpoint."""
        return self._anchors.prepare(stored)

    def lessons(self, generator: torch.Generator) -> list[Lesson]:
        """The concept read as its anchor and, with a prior, the anchor held to its pictures."""
        settings, denoiser = self._settings, self.denoiser
        view = self._anchors.view(self.batch_size, generator)
        with self.room.trained() if settings.teacher == "trained" else nullcontext():
            aim = denoiser.predict(view.latents, view.times, view.text)
        lessons = [Lesson(view.latents, view.times, self.subject(view.captions), aim)]
        if settings.prior_weight:
            lessons.append(Lesson(view.latents, view.times, view.text, view.truth, settings.prior_weight))
        return lessons
