"""How many runs of a pipeline fit into memory: measured on one run, not guessed from a model's name.

One forward pass of the UNet and one of the VAE decoder, a single row each, with hooks that note the bytes of every
module's output. A row is charged for the skip tensors that the UNet keeps, plus four times its largest tensor (input,
output, and two temporaries of a block), twice because of classifier-free guidance; or for four times the largest
tensor of the decoder if that is more. It is a bound for planning, on the safe side, not a measurement of a peak.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

_FALLBACK = 4 * 2**30
_TEMPORARIES = 4
_BRANCHES = 2


def row_bytes(pipeline: Any, pixels: int | None) -> int:
    """Bytes that one more run in a batch needs.

    Args:
        pipeline: a `StableDiffusionPipeline`; the caller turns gradients off.
        pixels: side length of the pictures; default: the UNet's own.
    """
    unet, vae = pipeline.unet, pipeline.vae
    latent = torch.zeros(latent_shape(pipeline, pixels), device=unet.device, dtype=unet.dtype)
    width = unet.config.cross_attention_dim
    text = torch.zeros(1, 8, width if isinstance(width, int) else width[0], device=unet.device, dtype=unet.dtype)
    sizes = _outputs(unet, lambda: unet(latent, torch.tensor(0, device=unet.device), encoder_hidden_states=text))
    kept = sum(size for name, size in sizes.items() if name.startswith("down_blocks.") and name.count(".") == 3)
    row = _BRANCHES * (kept + _TEMPORARIES * max(sizes.values()))
    decoded = _outputs(vae, lambda: vae.decode(latent.to(vae.dtype)))
    return int(max(row, _TEMPORARIES * max(decoded.values())))


def latent_shape(pipeline: Any, pixels: int | None) -> tuple[int, int, int, int]:
    """[1, c, h, w] of the latents of a picture."""
    unet = pipeline.unet
    size = unet.config.sample_size if pixels is None else pixels // pipeline.vae_scale_factor
    height, width = (size, size) if isinstance(size, int) else size
    return (1, int(unet.config.in_channels), int(height), int(width))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, as far as the system says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every system counts its pages
        return _FALLBACK


def _outputs(module: nn.Module, run: Any) -> dict[str, int]:
    """Bytes of each submodule's output in the pass that `run` makes."""
    sizes: dict[str, int] = {"": 1}
    handles = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                sizes[name] = first.numel() * first.element_size()

        return hook

    try:
        for name, child in module.named_modules():
            handles.append(child.register_forward_hook(note(name)))
        run()
    finally:
        for handle in handles:
            handle.remove()
    return sizes
