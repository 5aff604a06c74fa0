"""ESD, erased Stable Diffusion: train the UNet to steer away from a concept, with the original as its teacher.

    |eps_theta(x_t, c) - [eps*(x_t, "") - eta (eps*(x_t, c) - eps*(x_t, ""))]|^2,      eps*: the frozen original

x_t is a picture of the concept in the making: sampled with guidance from noise, stopped at a random step. No pictures
and no target are needed; the concept's prompts come to mean "not that", which is no particular thing.

Source: Gandikota et al. 2023 (arXiv 2303.07345). Settings follow the authors' current code (200 steps, learning rate
    5e-5, 50 sampling steps, guidance 3); its negative guidance of 2 counts from eps*(x_t, c) and is eta = 1 here.
Variants: `esd` trains keys and values of the UNet's cross-attention, which the authors call ESD-x (strict): the concept
    goes where its words stand. `esd-u` trains what is not cross-attention: it goes whatever the prompt says, and others
    go with it more easily. Of these layers it trains the linear ones (`backends.unet_linear`), which hold 27% of the
    parameters that the paper's ESD-u trains in Stable Diffusion 1.x; convolutions stay as they are.
Differs: float32 instead of bfloat16; the request's templates instead of the bare name. For models that predict
    velocity the same formula is used on it; its weights sum to 1, so that only scales the loss by a factor of t.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import ClassVar, Literal

import torch
from pydantic import Field

from diffedit.errors import RequestError
from diffedit.interfaces import Backend
from diffedit.request import Request
from diffedit.site import Role
from diffedit.updaters.finetune.base import FineTune
from diffedit.updaters.finetune.noise import Lesson, NoiseObjective
from diffedit.updaters.finetune.scratch import Scratch


class ESD(FineTune):
    """Erased Stable Diffusion, on the keys and values of the UNet's cross-attention.

    Attributes:
        negative_guidance: eta; larger pushes further away from the concept.
        start_guidance: guidance scale while x_t is sampled.
        sampling_steps: denoising steps of a whole sampling; default: the model's own (50 for Stable Diffusion).
        trajectory: which model samples x_t: the `original` (the authors' code) or the one being `trained` (the paper).
    """

    name = "esd"
    reference = "Gandikota et al. 2023, arXiv 2303.07345, ESD-x on keys and values"
    roles: ClassVar[tuple[Role, ...]] = (Role.UNET_CROSS_ATTN_K, Role.UNET_CROSS_ATTN_V)
    locator: ClassVar[str] = "cross-attention"

    learning_rate: float = Field(default=5e-5, ge=0, allow_inf_nan=False)
    negative_guidance: float = Field(default=1.0, allow_inf_nan=False)
    start_guidance: float = Field(default=3.0, allow_inf_nan=False)
    sampling_steps: int | None = Field(default=None, ge=1)
    trajectory: Literal["original", "trained"] = "original"

    def objective(self, backend: Backend, requests: Sequence[Request], room: Scratch) -> NoiseObjective:
        """Steering away from the subjects.

        Raises:
            RequestError: an update, which needs a meaning to go to.
        """
        for request in requests:
            if request.action != "ablate":
                raise RequestError(
                    f"{self.name} erases and cannot give another meaning",
                    value=repr(request.subject),
                    hint="use concept-ablation, finetune-text-encoder or a closed-form updater",
                )
        return _Away(self, backend, requests, room)


class ESDUnconditional(ESD):
    """Erased Stable Diffusion, on the UNet's linear layers outside of cross-attention; settings as for `ESD`."""

    name = "esd-u"
    reference = "Gandikota et al. 2023, arXiv 2303.07345, ESD-u on linear layers, without convolutions"
    roles: ClassVar[tuple[Role, ...]] = (
        Role.UNET_SELF_ATTN,
        Role.UNET_FEED_FORWARD,
        Role.UNET_TIME,
        Role.UNET_PROJECTION,
    )
    locator: ClassVar[str] = "unet-unconditional"


class _Away(NoiseObjective):
    def __init__(self, settings: ESD, backend: Backend, requests: Sequence[Request], room: Scratch) -> None:
        super().__init__(
            backend, requests, room, settings.batch_size, settings.preserve_weight, settings.sampling_steps
        )
        self._settings = settings

    def lessons(self, generator: torch.Generator) -> list[Lesson]:
        """One lesson at a random step of a sampling."""
        settings, denoiser, n = self._settings, self.denoiser, self.batch_size
        text = self.subject(torch.randint(0, self.subjects, (n,), generator=generator))
        stop = int(torch.randint(0, denoiser.steps, (1,), generator=generator))
        noise = denoiser.noise(n, generator)
        with self.room.trained() if settings.trajectory == "trained" else nullcontext():
            latents = denoiser.sample(text, noise, guidance=settings.start_guidance, stop=stop)
        times = denoiser.times[stop].expand(n)
        without = denoiser.predict(latents, times, denoiser.empty.expand(n, -1, -1))
        conditioned = denoiser.predict(latents, times, text)
        return [Lesson(latents, times, text, without - settings.negative_guidance * (conditioned - without))]
