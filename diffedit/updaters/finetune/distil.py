"""Self-distillation through the UNet: prompts of a subject should predict the noise that the target's prompts predict.

    mean |eps(x_t, t, h_i) - eps*(x_t, t, g_i)|^2

with h_i the text states of a prompt of the subject, whatever moves them, g_i those of the same prompt with the target,
frozen, and x_t a noised picture that the model made from prompt i. Noise and timesteps are new at every call.

Source: Xiong et al. 2024 (EMCID, arXiv 2403.13807); its released code makes the pictures from the subject's prompts.
Limits: those of `denoising`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffedit.interfaces import Backend
from diffedit.updaters.finetune.anchors import Anchors
from diffedit.updaters.finetune.denoising import Denoiser, check_pipeline


class NoiseMatch:
    """The loss for some prompts.

    Args:
        backend: the model.
        prompts: of the subject.
        goals: the same with the target.
        pictures: how many to make of the subject, spread over the prompts.
        guidance: guidance scale they are sampled with.
        steps: their denoising steps; default: the model's own.
        seed: of pictures, noise and timesteps.

    Raises:
        UnsupportedModelError: the pipeline's UNet takes more than latents, time and one text.
    """

    def __init__(
        self,
        backend: Backend,
        prompts: Sequence[str],
        goals: Sequence[str],
        *,
        pictures: int,
        guidance: float,
        steps: int | None,
        seed: int,
    ) -> None:
        check_pipeline(backend)
        with torch.no_grad():
            self._denoiser = Denoiser(backend, steps)
            self._goals = self._denoiser.embed(goals)
            texts = self._denoiser.embed(prompts)
            self._pictures = Anchors(self._denoiser, texts, pictures, guidance, seed)
            self._pictures.prepare({})
        self._batch = min(pictures, len(prompts))
        self._generator = torch.Generator().manual_seed(seed % 2**63)

    def __call__(self, states: Tensor) -> Tensor:
        """The loss of states [b, t, d], all positions that the UNet reads, one row per prompt; its gradient flows."""
        with torch.no_grad():
            view = self._pictures.view(self._batch, self._generator)
            rows = view.captions.to(states.device)
            wanted = self._denoiser.predict(view.latents, view.times, self._goals[rows])
        found = self._denoiser.predict(view.latents, view.times, states[rows].to(self._goals.dtype))
        return torch.nn.functional.mse_loss(found.float(), wanted.float())
