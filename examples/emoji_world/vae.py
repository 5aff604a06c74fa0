"""The autoencoder: a stock diffusers `AutoencoderKL`, 64 x 64 x 3 pictures to 8 x 8 x 8 latents.

Two things matter at this size: at most 4 norm groups (more would be an instance norm, which loses the colour), and no
posterior sampling (it drowns the signal): the mean plus a little noise is decoded, with a small penalty on its square.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKL

from .common import load_checkpoint, rank, save_grid, train
from .pictures import Pictures
from .world import BACKGROUNDS, OBJECTS, PIXELS, STYLES

CHANNELS = (16, 32, 64, 96)
NOISE = 0.1


def make_vae() -> AutoencoderKL:
    """The untrained autoencoder."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        sample_size=PIXELS,
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        layers_per_block=1,
        norm_num_groups=4,
    )


def picture_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Absolute error, squared error, colour (error without its grey part), edges, and a coarse copy."""
    error = output - target
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    colour = (error - error.mean(1, keepdim=True)).abs().mean()
    coarse = torch.nn.functional.avg_pool2d(error, 4).abs().mean()
    return error.abs().mean() + error.square().mean() + 5 * colour + 0.5 * edges + 0.5 * coarse


def whiteness(latents: torch.Tensor) -> torch.Tensor:
    """How far the latent channels are from zero mean, unit variance and no correlation.

    Without this the encoder settles on four of its eight dimensions and never finds the colours.
    """
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
    centre = flat.mean(0)
    covariance = (flat - centre).T @ (flat - centre) / len(flat)
    return (covariance - torch.eye(len(centre))).square().mean() + centre.square().mean()


def train_vae(work: Path, minutes: float, seed: int = 1, batch: int = 8) -> AutoencoderKL:
    """Train for a number of minutes (resumable) and write the scaled model to `<work>/vae`."""
    source = Pictures.load(work)
    torch.manual_seed(seed)
    vae = make_vae().to(memory_format=torch.channels_last)
    saved = load_checkpoint(work / "vae.pt")
    begin = seed + rank() + 1000 * (saved["step"] if saved else 0)  # fresh pictures and noise after a restart
    rng, _ = Random(begin), torch.manual_seed(begin)
    held_out = torch.stack(
        [
            source.draw(o, s, (o + s) % len(BACKGROUNDS), 1, -2)
            for s in range(len(STYLES))
            for o in range(0, len(OBJECTS), 7)
        ]
    )

    def loss_of(step: int) -> torch.Tensor:
        target = source.batch(rng, batch)[0].contiguous(memory_format=torch.channels_last)
        mean = vae.encode(target).latent_dist.mean
        output = vae.decode(mean + NOISE * torch.randn_like(mean)).sample
        return picture_loss(output, target) + 0.05 * whiteness(mean)

    @torch.no_grad()
    def report(step: int) -> None:
        copies = vae.eval().decode(vae.encode(held_out).latent_dist.mean).sample
        save_grid(torch.stack([held_out, copies], 1).flatten(0, 1), work / "vae-grid.png", 20)

    train(
        "vae",
        work,
        vae,
        loss_of,
        steps=100_000,
        minutes=minutes,
        rate=2e-3,
        warmup=60,
        average=0.99,
        report=report,
        report_every=200,
    )
    if rank():
        return vae
    report(0)
    latents = encode(vae, source.batch(Random(seed + 1), 512)[0])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 6))
    vae.save_pretrained(work / "vae")
    return vae


def load_vae(work: Path) -> AutoencoderKL:
    """The trained autoencoder."""
    return AutoencoderKL.from_pretrained(work / "vae").eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Unscaled latent means."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(batch)])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Pictures from unscaled latents."""
    return torch.cat([vae.decode(part).sample for part in latents.split(batch)])
