"""Disturbances for the judges (scorer and classifier): blur, noise, colour shifts, resizing, autoencoder copies."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn.functional import avg_pool2d, interpolate, pad
from tqdm import tqdm

from .common import to_uint8
from .pictures import JITTER, Pictures
from .world import BACKGROUNDS, OBJECTS, STYLES

NOISE = 0.5  # most noise on a copy's latents, whose own spread is 1: a denoiser's pictures are softer than drawings


def blur(pictures: torch.Tensor, kernel: int) -> torch.Tensor:
    """Box blur with edge padding."""
    side = kernel // 2
    return avg_pool2d(pad(pictures, (side,) * 4, mode="replicate"), kernel, stride=1)


@torch.no_grad()
def autoencoded(vae: AutoencoderKL, pictures: torch.Tensor, noise: float) -> torch.Tensor:
    """Pictures after the autoencoder, with some noise on the (scaled) latents."""
    mean = vae.encode(pictures).latent_dist.mean
    return vae.decode(mean + noise / vae.config.scaling_factor * torch.randn_like(mean)).sample.clamp(-1, 1)


class Copies:
    """One autoencoder copy of every (object, style, background), made once: the autoencoder is dear."""

    def __init__(self, work: Path, vae: AutoencoderKL, seed: int = 21) -> None:
        path = work / "copies.npy"
        if not path.exists():
            source, rng = Pictures.load(work), Random(seed)
            parts = []
            for name in tqdm(range(len(OBJECTS)), desc="copies", mininterval=10):
                drawn = [
                    source.draw(name, style, ground, rng.randint(-JITTER, JITTER), rng.randint(-JITTER, JITTER))
                    for style in range(len(STYLES))
                    for ground in range(len(BACKGROUNDS))
                ]
                parts.append(to_uint8(autoencoded(vae, torch.stack(drawn), NOISE * rng.random())))
            np.save(path, np.concatenate(parts))
        stored = torch.from_numpy(np.load(path)).permute(0, 3, 1, 2)
        self.pictures = stored.view(len(OBJECTS), len(STYLES), len(BACKGROUNDS), *stored.shape[1:])

    def of(self, labels: list[tuple[int, int, int]]) -> torch.Tensor:
        """The copies of a batch, in [-1, 1]."""
        return torch.stack([self.pictures[label] for label in labels]).float() / 127.5 - 1


@torch.no_grad()
def augmented(pictures: torch.Tensor, rng: Random, copies: torch.Tensor | None = None) -> torch.Tensor:
    """Replace half by its autoencoder copies, disturb parts in different ways, change all colours a little."""
    pictures = pictures.clone()
    size = len(pictures)
    order = torch.tensor(rng.sample(range(size), size))
    if copies is not None:
        chosen = order[: size // 2]
        pictures[chosen] = copies[chosen]
    order = order.roll(size // 4)
    softened = order[: size // 4]
    pictures[softened] = blur(pictures[softened], rng.choice((3, 3, 5)))
    small = order[size // 4 : size // 3]
    halved = interpolate(pictures[small], size=32, mode="area")
    pictures[small] = interpolate(halved, size=pictures.shape[-1], mode="bilinear")
    noisy = order[size // 2 :]
    pictures[noisy] += 0.15 * rng.random() * torch.randn_like(pictures[noisy])
    gain = 1 + 0.15 * (torch.rand(size, 3, 1, 1) * 2 - 1)
    shift = 0.08 * (torch.rand(size, 1, 1, 1) * 2 - 1)
    return (pictures * gain + shift).clamp(-1, 1)
