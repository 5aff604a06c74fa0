"""Causal tracing in a UNet: several runs side by side in one batch, some of which take a part's output from the first.

The paper stores nothing: clean and restored runs are denoised together, and in every denoising step, on both sides of
the attention's residual alike, the output of the chosen part in a restored row is overwritten by the clean row's. With
classifier-free guidance the batch is [unconditional rows, conditional rows]. By default only the conditional half is
restored, since the noise enters only there; `both_branches` restores both (the paper does not say which it does).

`LocoGen` (Basu et al. 2024, arXiv 2405.01008) uses the same machinery the other way round: chosen cross-attention
layers of a row read the embedding of row 0, and everything else in it is its own.

Shapes: embeddings [n, t, d], latents [n, c, h, w]. Limits: the restored activation also carries what the clean row's
latents show by then, so a late, high-resolution part can look causal because it copies the picture itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffedit.backends.hooks import evaluating
from diffedit.backends.memory import latent_shape
from diffedit.backends.quiet import quiet
from diffedit.errors import RequestError, UnsupportedModelError
from diffedit.intervention import CROSS_ATTN, FEED_FORWARD, RESNET, SELF_ATTN, UNET, Part, Runs
from diffedit.site import EditSite

if TYPE_CHECKING:
    from PIL.Image import Image

_STAGES = ("down_blocks", "mid_block", "up_blocks")


def unet_parts(unet: nn.Module, sites: Sequence[EditSite] = ()) -> tuple[Part, ...]:
    """Self-attention, cross-attention, feed-forward and ResNet blocks in the order in which the UNet runs them.

    That order is down, middle, up, which neither the alphabet nor `named_modules` keeps. On SD 1.x: 16 + 16 + 16 + 22.
    """
    found: list[tuple[tuple[int, ...], str, str]] = []
    for path, module in unet.named_modules():
        pieces = path.split(".")
        if pieces[0] not in _STAGES:
            continue
        numbers = [int(piece) for piece in pieces if piece.isdigit()]
        stage = _STAGES.index(pieces[0])
        place = (stage, *(numbers if stage != 1 else [0, *numbers]))
        if type(module).__name__ == "ResnetBlock2D":
            found.append(((*place, 0), RESNET, path))
        elif type(module).__name__ == "BasicTransformerBlock":
            block = (*place[:3], 1, *place[3:])
            found.append(((*block, 0), SELF_ATTN, f"{path}.attn1"))
            if getattr(module, "attn2", None) is not None:
                found.append(((*block, 1), CROSS_ATTN, f"{path}.attn2"))
            found.append(((*block, 2), FEED_FORWARD, f"{path}.ff"))
    counts: dict[str, int] = {}
    parts = []
    for order, (_, kind, path) in enumerate(sorted(found)):
        inside = tuple(site for site in sites if site.component == UNET and site.path.startswith(path + "."))
        parts.append(Part(UNET, order, kind, counts.get(kind, 0), path, inside))
        counts[kind] = counts.get(kind, 0) + 1
    if not parts:
        raise UnsupportedModelError("the UNet has no parts to trace", value=type(unet).__name__)
    return tuple(parts)


class UNetRuns:
    """Computes `Runs` with the UNet of a pipeline.

    Args:
        pipeline: a `StableDiffusionPipeline`; it is left as it was.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._unet = pipeline.unet

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode and no gradients in UNet and VAE."""
        with evaluating(self._unet), evaluating(self._pipeline.vae):
            yield

    def sample(
        self, runs: Runs, empty: Tensor, *, steps: int, guidance: float, batch_size: int, pixels: int | None
    ) -> list[Image]:
        """One image per run, by the pipeline's own sampling loop and scheduler.

        Args:
            runs: n runs.
            empty: [1, t, d], embedding of the empty prompt.
            steps: denoising steps.
            guidance: classifier-free guidance scale.
            batch_size: runs computed together, the reference among them.
            pixels: side length; default: the UNet's own.
        """
        images: list[Image] = []
        once, last = _text_read_once(self._unet), _channels_last(self._unet)
        with self.evaluating(), quiet(self._pipeline), once, last:
            for rows, keep in _batches(runs, batch_size):
                n = len(rows)
                with self._patched(runs, rows):
                    out = self._pipeline(
                        prompt_embeds=runs.embeddings[rows],
                        negative_prompt_embeds=empty.expand(n, -1, -1),
                        generator=[torch.Generator().manual_seed(runs.seed) for _ in rows],
                        num_inference_steps=steps,
                        guidance_scale=guidance,
                        height=pixels,
                        width=pixels,
                    )
                images += out.images[n - keep :]
        return images

    def predict(self, runs: Runs, timesteps: Sequence[float], *, batch_size: int, pixels: int | None) -> Tensor:
        """[n, k, c, h, w] float32; the latents are Gaussian, drawn on the CPU so that every device sees the same."""
        unet = self._unet
        length = int(self._pipeline.scheduler.config.num_train_timesteps)
        if not timesteps or not all(0 <= share < 1 for share in timesteps):
            raise RequestError("timesteps are shares of the schedule in [0, 1), at least one", value=list(timesteps))
        generator = torch.Generator().manual_seed(runs.seed)
        shape = latent_shape(self._pipeline, pixels)
        latents = [torch.randn(shape, generator=generator).to(unet.device, unet.dtype) for _ in timesteps]
        columns = []
        for latent, share in zip(latents, timesteps, strict=True):
            step = torch.tensor(int(share * length), device=unet.device)
            seen: list[Tensor] = []
            for rows, keep in _batches(runs, batch_size):
                batch = latent.expand(len(rows), -1, -1, -1)
                text = runs.embeddings[rows].to(unet.dtype)
                with self.evaluating(), self._patched(runs, rows):
                    out = unet(batch, step, encoder_hidden_states=text, return_dict=False)[0]
                seen.append(out.detach().float()[len(rows) - keep :])
            columns.append(torch.cat(seen))
        return torch.stack(columns, dim=1)

    @contextmanager
    def _patched(self, runs: Runs, rows: Sequence[int]) -> Iterator[None]:
        """Hooks that let the rows of one batch take what they should from its first row."""
        takers: dict[str, list[int]] = {}
        for row, index in enumerate(rows):
            for part in runs.parts[index]:
                takers.setdefault(self._check(part, runs), []).append(row)
        modules: Mapping[str, nn.Module] = dict(self._unet.named_modules()) if takers else {}
        handles = []
        n, both = len(rows), runs.both_branches

        def output(takes: list[int]) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
                base = out.shape[0] - n  # the unconditional rows stand first, if there are any
                changed = out.clone()
                changed[[base + row for row in takes]] = out[base]
                if both and base:
                    changed[takes] = out[0]
                return changed

            return hook

        def reading(takes: list[int]) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                text = kwargs["encoder_hidden_states"]
                base = text.shape[0] - n
                changed = text.clone()
                changed[[base + row for row in takes]] = text[base]
                return args, {**kwargs, "encoder_hidden_states": changed}

            return hook

        try:
            for path, takes in takers.items():
                if runs.take == "output":
                    handles.append(modules[path].register_forward_hook(output(takes)))
                else:
                    handles.append(modules[path].register_forward_pre_hook(reading(takes), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check(self, part: Part, runs: Runs) -> str:
        known = part.component == UNET and any(path == part.path for path, _ in self._unet.named_modules())
        if not known or (runs.take == "embedding" and part.kind != CROSS_ATTN):
            need = "cross-attention of the UNet" if runs.take == "embedding" else "part of the UNet"
            raise UnsupportedModelError(f"a run can only be patched at a {need}", value=f"{part.component} {part.path}")
        return part.path


@contextmanager
def _text_read_once(unet: nn.Module) -> Iterator[None]:
    """Cross-attention computes keys and values of the text in the first denoising step and keeps them for the others.

    They depend on nothing but the text, which the pipeline hands over as the same tensor in every step. A layer that
    is given another tensor, as `LocoGen` does, computes them anew.
    """
    blocks: list[Any] = [module for module in unet.modules() if type(module).__name__ == "BasicTransformerBlock"]
    readers = [block.attn2 for block in blocks if block.attn2 is not None]
    layers = [layer for reader in readers for layer in (reader.to_k, reader.to_v)]
    own = [vars(layer).get("forward") for layer in layers]  # libraries that offload weights set one

    def once(forward: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        kept: list[Tensor] = []  # the text, and what became of it

        def wrapper(text: Tensor) -> Tensor:
            if not kept or text is not kept[0]:
                kept[:] = [text, forward(text)]
            return kept[1]

        return wrapper

    try:
        for layer in layers:
            vars(layer)["forward"] = once(layer.forward)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = forward


@contextmanager
def _channels_last(unet: nn.Module) -> Iterator[None]:
    """Convolutions with their channels innermost, which CPUs compute faster; the very weights are back afterwards."""
    convolutions = [m for m in unet.modules() if isinstance(m, nn.Conv2d) and m.weight.device.type == "cpu"]
    own = [module.weight.data for module in convolutions]
    try:
        for module, weight in zip(convolutions, own, strict=True):
            module.weight.data = weight.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for module, weight in zip(convolutions, own, strict=True):
            module.weight.data = weight


def _batches(runs: Runs, batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Rows to compute together, and how many of them, from the end, are new.

    Run 0 stands first in every batch that takes something from it; it is computed again there instead of being stored,
    since its activations over all steps would not fit into memory.
    """
    waiting = list(range(len(runs)))
    while waiting:
        head = waiting[:batch_size]
        if not any(runs.parts[index] for index in head) or head[0] == 0:
            rows, keep = head, len(head)
        else:
            head = waiting[: max(1, batch_size - 1)]
            rows, keep = [0, *head], len(head)
        waiting = waiting[keep:]
        yield rows, keep
