"""Disturbances for the judges (scorer and classifier): blur, noise, colour shifts, resizing, autoencoder copies."""

from __future__ import annotations

from random import Random

import torch
from diffusers import AutoencoderKL
from torch.nn.functional import avg_pool2d, interpolate, pad


def blur(pictures: torch.Tensor, kernel: int) -> torch.Tensor:
    """Box blur with edge padding."""
    side = kernel // 2
    return avg_pool2d(pad(pictures, (side,) * 4, mode="replicate"), kernel, stride=1)


@torch.no_grad()
def augmented(pictures: torch.Tensor, rng: Random, vae: AutoencoderKL | None = None) -> torch.Tensor:
    """Disturb parts of a batch in different ways, and change every picture's colours a little.

    If an autoencoder is given, a third of the batch goes through it with noisy latents first.
    """
    pictures = pictures.clone()
    size = len(pictures)
    order = torch.tensor(rng.sample(range(size), size))
    if vae is not None:
        chosen = order[: size // 3]
        mean = vae.encode(pictures[chosen]).latent_dist.mean
        noise = 0.25 * rng.random() / (vae.config.scaling_factor or 1)
        pictures[chosen] = vae.decode(mean + noise * torch.randn_like(mean)).sample.clamp(-1, 1)
    order = order.roll(size // 4)
    softened = order[: size // 4]
    pictures[softened] = blur(pictures[softened], 3)
    small = order[size // 4 : size // 3]
    pictures[small] = interpolate(
        interpolate(pictures[small], size=32, mode="area"), size=pictures.shape[-1], mode="bilinear"
    )
    noisy = order[size // 2 :]
    pictures[noisy] += 0.15 * rng.random() * torch.randn_like(pictures[noisy])
    gain = 1 + 0.15 * (torch.rand(size, 3, 1, 1) * 2 - 1)
    shift = 0.08 * (torch.rand(size, 1, 1, 1) * 2 - 1)
    return (pictures * gain + shift).clamp(-1, 1)
