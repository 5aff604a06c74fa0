"""What the fine-tuning objectives need of a diffusion model: embed, add noise, predict, and sample part of the way.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,        the model predicts eps (or v) from x_t, t and the text

Sampling is DDIM without added noise (Song et al. 2021, arXiv 2010.02502), on a scheduler of our own made from the
pipeline's settings: deterministic given the starting noise, and the pipeline's scheduler keeps its state. Random
numbers are drawn on the CPU from generators that are passed in, so that every device sees the same.

Shapes: latents [b, c, h, w], text [b, t, d], timesteps [b]. Limits: one text encoder, no added conditions (SDXL), no
inpainting channels, no guidance embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffedit.errors import UnsupportedModelError
from diffedit.interfaces import Backend


class Denoiser:
    """The UNet of a pipeline, as the objectives use it.

    Args:
        backend: the model; it has passed `check_pipeline`.
        steps: denoising steps of a whole sampling; default: the model's own.

    """

    def __init__(self, backend: Backend, steps: int | None = None) -> None:
        self._pipeline: Any = backend.model.pipeline
        self._unet: Any = self._pipeline.unet
        self._pixels = backend.model.sampling.pixels
        self.steps = steps or backend.model.sampling.steps
        self._scheduler = DDIMScheduler.from_config(self._pipeline.scheduler.config)
        self._scheduler.set_timesteps(self.steps, device=self._unet.device)
        self.empty = self.embed([""]).detach()

    @property
    def times(self) -> Tensor:
        """[steps], the timesteps of a whole sampling, noisiest first."""
        times: Tensor = self._scheduler.timesteps
        return times

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """[n, c, h, w] standard normal latents."""
        size = self._unet.config.sample_size
        if self._pixels is not None:
            size = self._pixels // self._pipeline.vae_scale_factor
        height, width = (size, size) if isinstance(size, int) else size
        shape = (n, int(self._unet.config.in_channels), int(height), int(width))
        return torch.randn(shape, generator=generator).to(self._unet.device, self._unet.dtype)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """[b, t, d], what the pipeline conditions on."""
        return read(self._pipeline, tokenize(self._pipeline, prompts))

    def predict(self, latents: Tensor, times: Tensor, text: Tensor) -> Tensor:
        """[b, c, h, w], the UNet's output: noise or velocity, whichever the model was trained for."""
        out: Tensor = self._unet(latents, times, encoder_hidden_states=text, return_dict=False)[0]
        return out

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t of the clean latents."""
        noised: Tensor = self._scheduler.add_noise(clean, noise, times)
        return noised

    def truth(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What a perfect model predicts at `add_noise(clean, noise, times)`, as far as one picture tells."""
        kind = self._scheduler.config.prediction_type
        if kind == "v_prediction":
            velocity: Tensor = self._scheduler.get_velocity(clean, noise, times)
            return velocity
        return noise if kind == "epsilon" else clean

    def random_times(self, n: int, generator: torch.Generator) -> Tensor:
        """[n], uniform over all timesteps of training."""
        length = int(self._scheduler.config.num_train_timesteps)
        return torch.randint(0, length, (n,), generator=generator).to(self._unet.device)

    @torch.no_grad()
    def sample(self, text: Tensor, noise: Tensor, *, guidance: float, stop: int | None = None) -> Tensor:
        """Latents after `stop` denoising steps (default: all) from `noise`, with classifier-free guidance."""
        latents: Tensor = noise * self._scheduler.init_noise_sigma
        both = torch.cat([self.empty.expand(text.shape[0], -1, -1), text])
        for time in self.times[:stop]:
            doubled = self._scheduler.scale_model_input(torch.cat([latents, latents]), time)
            without, conditioned = self.predict(doubled, time, both).chunk(2)
            guided = without + guidance * (conditioned - without)
            latents = self._scheduler.step(guided, time, latents).prev_sample
        return latents


def tokenize(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    """[b, t] token ids, padded as the pipeline does."""
    tokenizer = pipeline.tokenizer
    batch = tokenizer(
        list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return torch.as_tensor(batch["input_ids"]).to(pipeline.text_encoder.device)


def read(pipeline: Any, tokens: Tensor) -> Tensor:
    """[b, t, d], what the UNet conditions on; gradients are kept if the caller records them."""
    text: Tensor = pipeline.text_encoder(input_ids=tokens)[0]
    return text


def check_pipeline(backend: Backend, *, unet: bool = True) -> None:
    """Refuse a pipeline with more than one text encoder, or whose UNet takes more than latents, time and one text.

    Args:
        backend: the model.
        unet: whether the UNet will be used at all.

    Raises:
        UnsupportedModelError: it does.
    """
    pipeline = backend.model.pipeline
    if getattr(pipeline, "text_encoder_2", None) is not None:
        raise _unsupported(pipeline, "it has two text encoders")
    if not unet:
        return
    config = getattr(getattr(pipeline, "unet", None), "config", None)
    wrong = (
        "it has no UNet"
        if config is None
        else f"its UNet takes added conditions ({config.addition_embed_type})"
        if getattr(config, "addition_embed_type", None) is not None
        else "its UNet takes a guidance embedding"
        if getattr(config, "time_cond_proj_dim", None) is not None
        else f"its UNet has {config.in_channels} channels in, {config.out_channels} out"
        if config.in_channels != config.out_channels
        else None
    )
    if wrong is not None:
        raise _unsupported(pipeline, wrong)


def _unsupported(pipeline: Any, cause: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "fine-tuning works on Stable Diffusion 1.x and 2.x",
        value=type(pipeline).__name__,
        cause=cause,
        hint="use a closed-form updater",
    )
