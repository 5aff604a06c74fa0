"""Two measures that need no pictures: how far a run is from the clean one, in the embedding and in what is denoised.

    Phi(run) = -|x(run) - x(clean)| / |x(clean)|

with x the text encoder's final states (`embedding`) or the noise that the UNet predicts for a few fixed latents and
timesteps (`denoising`). The clean run has 0, the corrupted one minus its distance, and a restored state counts for what
it brings back. The third measure, the score of finished pictures, is `diffedit.evaluate.scorer.ImageScore`.

Limits: a distance counts every difference, not only that of the concept. Guidance would multiply the distances of all
runs by the same number at equal latents, so the unconditional branch is left out. The latents are pure noise, which is
what the UNet sees at the noisy end of the schedule; that is why the timesteps lie there.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from diffedit.errors import UnsupportedModelError
from diffedit.interfaces import Backend
from diffedit.intervention import TEXT_ENCODER, UNET, Runs
from diffedit.traceable import Measure, traceable


class EmbeddingEffect(Measure):
    """Distance of the final text embedding from the clean one. Costs nothing; sees the text encoder only."""

    name = "embedding"
    reference = "diffedit: relative distance of the text encoder's final states"
    components: ClassVar[tuple[str, ...]] = (TEXT_ENCODER,)
    least_total_effect: ClassVar[float] = 0.01

    def measure(self, backend: Backend, runs: Runs, *, batch_size: int) -> list[float]:
        """Minus the relative distance, over all positions."""
        if runs.patched:
            raise UnsupportedModelError(
                "the measure 'embedding' cannot see the UNet", hint="use the measure 'denoising' or 'image'"
            )
        return _closeness(runs.embeddings)

    def evaluations(self, backend: Backend, runs: int) -> int:
        """None."""
        return 0


class DenoisingEffect(Measure):
    """Distance of the UNet's predicted noise from the clean run's, at fixed latents and timesteps.

    Attributes:
        timesteps: shares of the schedule, 1 the noisiest; more of them average more and cost more.
    """

    name = "denoising"
    reference = "diffedit: relative distance of the predicted noise"
    components: ClassVar[tuple[str, ...]] = (TEXT_ENCODER, UNET)
    least_total_effect: ClassVar[float] = 0.002

    timesteps: tuple[float, ...] = Field(default=(0.95, 0.85, 0.75), min_length=1)

    def measure(self, backend: Backend, runs: Runs, *, batch_size: int) -> list[float]:
        """Minus the relative distance, averaged over the timesteps."""
        seen = traceable(backend).predict(runs, self.timesteps, batch_size=batch_size)
        each = [_closeness(seen[:, column]) for column in range(len(self.timesteps))]
        return [sum(values) / len(values) for values in zip(*each, strict=True)]

    def evaluations(self, backend: Backend, runs: int) -> int:
        """One per run and timestep."""
        return runs * len(self.timesteps)


def _closeness(rows: Tensor) -> list[float]:
    """[n, ...] -> n numbers."""
    flat = rows.detach().to("cpu", torch.float64).flatten(1)
    distances = (flat - flat[:1]).norm(dim=1) / flat[0].norm()
    return [-float(value) for value in distances]
