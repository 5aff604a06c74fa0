"""Fine-tuning the text encoder: train chosen layers until the subject's prompt reads like the target's.

    embedding   |h_theta(s) - h*(t)|^2 / d         mean over positions from the last subject token on, paired by offset
    noise       |eps*(x_t, h_theta(s)) - eps*(x_t, h*(t))|^2 / (c h w)         x_t = noised pictures of the target

plus, for preserved names p, w |h_theta(p) - h*(p)|^2 / d over all positions. h is what the UNet reads, s the subject's
prompt, t the same prompt with the target; starred are the frozen originals. What stands before the subject cannot
change in a causal encoder.

Source: the plain rival on the closed form's own ground: the same weights, moved by gradients instead of a solve. Both
    losses are those that EMCID (Xiong et al. 2024, arXiv 2403.13807) distils a concept with, on weights here instead of
    on a hidden state; Kumari et al. 2023 (arXiv 2303.13516) train text embeddings with the second. Learning rate and
    steps are ours.
Limits: which layers are trained is the location's business. The default locator, `text-layers`, trains the attention
    and MLP outputs of all layers; biases, queries, keys and values are no edit sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffedit.interfaces import Backend
from diffedit.request import Request
from diffedit.site import Role
from diffedit.updaters.finetune.anchors import Anchors, View
from diffedit.updaters.finetune.base import FineTune, prompts_of, target_of
from diffedit.updaters.finetune.denoising import Denoiser, read, tokenize
from diffedit.updaters.finetune.scratch import Scratch
from diffedit.updaters.finetune.training import Objective


class FineTuneTextEncoder(FineTune):
    """The text encoder, trained so that the subject reads like the target.

    Attributes:
        loss: compare the `embedding` itself, or the `noise` that the UNet predicts from it, which costs a UNet pass
            forth and back per step and weighs directions by what they do to the picture.
        anchors: pictures of the target that the model makes of itself (`noise` only).
        anchor_guidance: guidance scale they are sampled with.
        sampling_steps: their denoising steps; default: the model's own.
    """

    name = "finetune-text-encoder"
    reference = "the losses of Xiong et al. 2024, arXiv 2403.13807, on the weights"
    roles: ClassVar[tuple[Role, ...]] = (Role.TEXT_SELF_ATTN_OUT, Role.TEXT_MLP_OUT)
    locator: ClassVar[str] = "text-layers"
    preserves = True

    learning_rate: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    batch_size: int = Field(default=8, ge=1)
    loss: Literal["embedding", "noise"] = "embedding"
    anchors: int = Field(default=32, ge=1)
    anchor_guidance: float = Field(default=6.0, allow_inf_nan=False)
    sampling_steps: int | None = Field(default=None, ge=1)

    def components(self) -> tuple[str, ...]:
        """The UNet runs only for the `noise` loss."""
        return ("text_encoder", "unet") if self.loss == "noise" else ("text_encoder",)

    def objective(self, backend: Backend, requests: Sequence[Request], room: Scratch) -> Objective:
        """The subjects read as their targets."""
        return _Reading(self, backend, requests, room)


@dataclass(frozen=True, eq=False)
class _Drawn:
    subjects: Tensor  # [b], which prompts
    kept: Tensor | None  # [b], which preserved prompts
    view: View | None
    predicted: Tensor | None  # [b, c, h, w], from the target's prompt


class _Reading(Objective):
    def __init__(
        self, settings: FineTuneTextEncoder, backend: Backend, requests: Sequence[Request], room: Scratch
    ) -> None:
        self._pipeline: Any = backend.model.pipeline
        self._settings, self._room = settings, room
        spans: list[tuple[int, int]] = []
        prompts: list[str] = []
        targets: list[str] = []
        for request in requests:
            goals = request.render(target_of(request))
            for name in request.names:
                for (prompt, at), (goal, goal_at) in zip(request.render(name), goals, strict=True):
                    prompts.append(prompt)
                    targets.append(goal)
                    here, there = backend.spans([(prompt, name, at), (goal, target_of(request), goal_at)])
                    spans.append((here.last, there.last))
        kept = [prompt for request in requests for name in request.preserve for prompt in prompts_of(request, name)]
        self._tokens = tokenize(self._pipeline, prompts)
        self._kept: Tensor | None = None
        with torch.no_grad():
            self._goals = read(self._pipeline, tokenize(self._pipeline, targets))
            if kept and settings.preserve_weight:
                self._kept = tokenize(self._pipeline, list(dict.fromkeys(kept)))
                self._still = read(self._pipeline, self._kept)
        length = self._goals.shape[1]
        position = torch.arange(length)
        paired = [(goal + position - start).clamp(0, length - 1) for start, goal in spans]
        self._aligned = torch.stack([self._goals[i, index] for i, index in enumerate(paired)])
        self._counts = torch.stack([position >= start for start, _ in spans]).to(self._goals.device)
        self._anchors: Anchors | None = None
        if settings.loss == "noise":
            self._denoiser = Denoiser(backend, settings.sampling_steps)
            guidance, seed = settings.anchor_guidance, requests[0].seed
            self._anchors = Anchors(self._denoiser, self._goals, settings.anchors, guidance, seed)

    def prepare(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The target's pictures, if the loss needs them."""
        return self._anchors.prepare(stored) if self._anchors else {}

    def draw(self, generator: torch.Generator) -> _Drawn:
        n = self._settings.batch_size
        view = predicted = None
        if self._anchors:
            view = self._anchors.view(n, generator)
            subjects, predicted = view.captions, self._denoiser.predict(view.latents, view.times, view.text)
        else:
            subjects = torch.randint(0, len(self._tokens), (n,), generator=generator)
        kept = None if self._kept is None else torch.randint(0, len(self._kept), (n,), generator=generator)
        return _Drawn(subjects, kept, view, predicted)

    def loss(self, drawn: _Drawn) -> Tensor:
        device = self._tokens.device
        subjects = drawn.subjects.to(device)
        rows = [self._tokens[subjects]]
        if self._kept is not None and drawn.kept is not None:
            rows.append(self._kept[drawn.kept.to(device)])
        with self._room.trained():
            reading = read(self._pipeline, torch.cat(rows)).float()
        moved, held = reading[: len(subjects)], reading[len(subjects) :]
        if drawn.view is None or drawn.predicted is None:
            counts = self._counts[subjects]
            total = ((moved - self._aligned[subjects]).square().mean(2) * counts).sum() / counts.sum()
        else:
            predicted = self._denoiser.predict(drawn.view.latents, drawn.view.times, moved.to(self._goals.dtype))
            total = torch.nn.functional.mse_loss(predicted.float(), drawn.predicted.float())
        if len(held) and drawn.kept is not None:
            still = self._still[drawn.kept.to(device)].float()
            total = total + self._settings.preserve_weight * torch.nn.functional.mse_loss(held, still)
        return total
