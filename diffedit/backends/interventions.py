"""Causal tracing in a CLIP text encoder: clean, corrupted and restored runs in one forward pass.

Noise is added to the embedding layer's output, which is the same as adding it to the word embeddings, since position
embeddings are only added. A run that restores a state of layer l is the corrupted run in every layer before l. So one
forward pass serves all runs: it starts with two rows (clean, corrupted), and each restored run joins as a copy of the
corrupted row at its first restored layer. Averaged over the layers that halves the work, and nothing is computed twice.

Shapes: rows [1 + 1 + p, t, d]; row 0 is clean, row 1 corrupted. Limits: parts are restored whole (all heads).
Differs from the paper in nothing that it states; it does not say how large the noise is (see `locators.noise`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffedit.backends.hooks import evaluating
from diffedit.backends.memory import free_memory, row_bytes
from diffedit.backends.unet_runs import UNetRuns, unet_parts
from diffedit.errors import UnsupportedModelError
from diffedit.intervention import EMBEDDING, MLP, SELF_ATTN, TEXT_ENCODER, UNET, Part, Patch, Runs, TextRuns
from diffedit.site import EditSite, Role
from diffedit.traceable import Traceable

_PREFIX = "text_model"
_MOST_ROWS = 64


class Interventions(Traceable):
    """The tracing half of `StableDiffusion`: needs `model`, `_root`, `_sites` and `tokenize` of it."""

    model: Any

    def parts(self, component: str) -> tuple[Part, ...]:
        """Embedding, self-attention and MLP of each layer, or what the UNet has; see `Traceable.parts`."""
        if component == TEXT_ENCODER:
            return self._text_parts()
        unet = getattr(self.model.pipeline, UNET, None)
        if component == UNET and unet is not None:
            return unet_parts(unet, self._all_sites())
        raise UnsupportedModelError(
            "the model has no such component to trace", value=repr(component), hint=f"Known: {TEXT_ENCODER}, {UNET}"
        )

    def embedding_scale(self) -> tuple[int, float]:
        """Width and standard deviation of the token embedding table."""
        weight = self._text_root().embeddings.token_embedding.weight.detach()
        return int(weight.shape[1]), float(weight.float().std())

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Last hidden state of the text encoder, as `encode_prompt` of the pipeline gives it."""
        encoder = self.model.pipeline.text_encoder
        with evaluating(encoder):
            states: Tensor = encoder(input_ids=self._tokens(prompts)).last_hidden_state
        return states.detach()

    def encode_runs(
        self, prompt: str, noise: Tensor, start: int, patches: Sequence[Patch], *, max_rows: int = 128
    ) -> TextRuns:
        """All runs of one prompt, in as many passes as `max_rows` asks for; see `Traceable.encode_runs`."""
        tokens = self._tokens([prompt])
        room = max(1, max_rows - 2)
        chunks = [patches[i : i + room] for i in range(0, len(patches), room)] or [[]]
        rows: list[Tensor] = []
        for chunk in chunks:
            states = self._forward(tokens, noise, start, chunk)
            rows += [states] if not rows else [states[2:]]
        states = torch.cat(rows)
        return TextRuns(tokens[0], states, states[:, self._end_of_text(tokens[0])])

    def sample(self, runs: Runs, *, steps: int | None, guidance: float | None, batch_size: int) -> list[Any]:
        """See `Traceable.sample`; the empty prompt is encoded once for all runs."""
        own = self.model.sampling
        return self._unet_runs().sample(
            runs,
            self.embed([""]),
            steps=own.steps if steps is None else steps,
            guidance=own.guidance if guidance is None else guidance,
            batch_size=batch_size,
            pixels=own.pixels,
        )

    def predict(self, runs: Runs, timesteps: Sequence[float], *, batch_size: int) -> Tensor:
        """See `Traceable.predict`."""
        return self._unet_runs().predict(runs, timesteps, batch_size=batch_size, pixels=self.model.sampling.pixels)

    def batch_limit(self, memory: int | None = None) -> int:
        """Measured once per call from the activations of a single run; never more than a few dozen runs."""
        with self._unet_runs().evaluating():
            per_run = row_bytes(self.model.pipeline, self.model.sampling.pixels)
        budget = free_memory(self.model.pipeline.unet.device) // 2 if memory is None else memory
        return max(1, min(_MOST_ROWS, budget // max(1, per_run)))

    def digest(self) -> str:
        """SHA-256 of the sum and the sum of squares of every weight, computed in float64."""
        found = hashlib.sha256()
        for name, part in sorted(self.model.pipeline.components.items()):
            if isinstance(part, nn.Module):
                for key, tensor in part.state_dict().items():
                    value = tensor.detach().double()
                    found.update(f"{name}.{key} {value.sum().item()!r} {(value * value).sum().item()!r}\n".encode())
        return found.hexdigest()

    def _forward(self, tokens: Tensor, noise: Tensor, start: int, patches: Sequence[Patch]) -> Tensor:
        """[2 + p, t, d] for one chunk of patches."""
        encoder, root = self.model.pipeline.text_encoder, self._text_root()
        with evaluating(encoder), _growing(root, noise, start, patches) as order:
            states = encoder(input_ids=tokens).last_hidden_state.detach()
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order, dtype=torch.long)] = torch.arange(len(order))
        return torch.cat([states[:2], states[2:][back.to(states.device)]])

    def _text_parts(self) -> tuple[Part, ...]:
        known = (site for site in self._all_sites() if site.component == TEXT_ENCODER)
        sites: dict[tuple[int, Role], EditSite] = {(site.layer, site.role): site for site in known}
        found = [Part(TEXT_ENCODER, 0, EMBEDDING, 0, f"{_PREFIX}.embeddings")]
        for layer in range(len(self._text_root().encoder.layers)):
            for kind, role in ((SELF_ATTN, Role.TEXT_SELF_ATTN_OUT), (MLP, Role.TEXT_MLP_OUT)):
                path = f"{_PREFIX}.encoder.layers.{layer}.{kind}"
                found.append(Part(TEXT_ENCODER, len(found), kind, layer, path, (sites[layer, role],)))
        return tuple(found)

    def _end_of_text(self, tokens: Tensor) -> int:
        eos = self.model.pipeline.tokenizer.eos_token_id
        return int((tokens == eos).int().argmax())

    def _unet_runs(self) -> UNetRuns:
        return UNetRuns(self.model.pipeline)

    def _text_root(self) -> Any:
        encoder = self.model.pipeline.text_encoder
        return getattr(encoder, "text_model", encoder)

    def _tokens(self, prompts: Sequence[str]) -> Tensor:
        tokens: Tensor = self.tokenize(prompts, padded=True)  # type: ignore[attr-defined]
        return tokens

    def _all_sites(self) -> tuple[EditSite, ...]:
        sites: tuple[EditSite, ...] = self.sites(*Role)  # type: ignore[attr-defined]
        return sites


@contextmanager
def _growing(root: Any, noise: Tensor, start: int, patches: Sequence[Patch]) -> Iterator[list[int]]:
    """Hooks that turn a pass over one prompt into all runs; yields the patches' indices in the order of their rows."""
    layers = root.encoder.layers
    joins: dict[int, list[int]] = {}
    for index, patch in enumerate(patches):
        joins.setdefault(_first_layer(patch, len(layers)), []).append(index)
    order: list[int] = []
    handles = []

    def enter(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            if layer == 0:
                noisy = states.clone()
                noisy[:, start : start + len(noise)] += noise.to(noisy)
                states = torch.cat([states, noisy])
            fresh = joins.get(layer, [])
            if fresh:
                order.extend(fresh)
                states = torch.cat([states, states[1:2].expand(len(fresh), -1, -1)])
            if layer == 0:
                states = _restored(states, patches, order, EMBEDDING, 0)
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        return hook

    def restore(kind: str, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, tuple):
                return (_restored(output[0], patches, order, kind, layer), *output[1:])
            return _restored(output, patches, order, kind, layer)

        return hook

    try:
        for number, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(enter(number), with_kwargs=True))
            handles.append(layer.self_attn.register_forward_hook(restore(SELF_ATTN, number)))
            handles.append(layer.mlp.register_forward_hook(restore(MLP, number)))
        yield order
    finally:
        for handle in handles:
            handle.remove()


def _restored(states: Tensor, patches: Sequence[Patch], order: Sequence[int], kind: str, layer: int) -> Tensor:
    """`states` with the clean row's values where a patch says so; the tensor itself if none does."""
    changed = states
    for row, index in enumerate(order, start=2):
        patch = patches[index]
        if any(part.kind == kind and part.layer == layer for part in patch.parts):
            changed = states.clone() if changed is states else changed
            where = list(patch.positions)
            changed[row, where] = states[0, where]
    return changed


def _first_layer(patch: Patch, layers: int) -> int:
    """The layer at which a patch's run leaves the corrupted one; an empty patch joins at the last."""
    for part in patch.parts:
        if part.component != TEXT_ENCODER or part.kind not in (EMBEDDING, SELF_ATTN, MLP) or part.layer >= layers:
            raise UnsupportedModelError("the text encoder has no such part", value=f"{part.component} {part.name}")
    return min((part.layer for part in patch.parts), default=layers - 1)
