"""What ESD and concept ablation share: lessons "at x_t and t, reading this text, predict that", for a trained UNet.

    loss = mean over lessons of w |eps_theta(x_t, t, c) - target|^2 / (c h w)

A preserved concept gives lessons too: there the target is what the original model predicts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffedit.interfaces import Backend
from diffedit.request import Request
from diffedit.updaters.finetune.base import prompts_of
from diffedit.updaters.finetune.denoising import Denoiser
from diffedit.updaters.finetune.scratch import Scratch
from diffedit.updaters.finetune.training import Objective


@dataclass(frozen=True, eq=False)
class Lesson:
    """One batch of what the trained model should predict.

    Attributes:
        latents: [b, c, h, w], x_t.
        times: [b], t.
        text: [b, t, d], what the model reads.
        target: [b, c, h, w].
        weight: of its mean squared error in the loss.
    """

    latents: Tensor
    times: Tensor
    text: Tensor
    target: Tensor
    weight: float = 1.0


class NoiseObjective(Objective):
    """An objective made of lessons.

    Args:
        backend: the model.
        requests: what to carry out; prompts are drawn evenly from all names and templates.
        room: the weights to train.
        batch_size: rows of a lesson.
        preserve_weight: of the lessons about preserved concepts.
        sampling_steps: of a whole sampling; default: the model's own.
    """

    def __init__(
        self,
        backend: Backend,
        requests: Sequence[Request],
        room: Scratch,
        batch_size: int,
        preserve_weight: float,
        sampling_steps: int | None,
    ) -> None:
        self.denoiser = Denoiser(backend, sampling_steps)
        self.room = room
        self.batch_size = batch_size
        self._preserve_weight = preserve_weight
        with torch.no_grad():
            self._subjects = self.denoiser.embed(
                [prompt for request in requests for name in request.names for prompt in prompts_of(request, name)]
            )
            kept = list(
                dict.fromkeys(
                    prompt for request in requests for name in request.preserve for prompt in prompts_of(request, name)
                )
            )
            self._preserved = self.denoiser.embed(kept) if kept and preserve_weight else None

    @property
    def subjects(self) -> int:
        """Number of prompts about the subjects."""
        return self._subjects.shape[0]

    def subject(self, index: Tensor) -> Tensor:
        """[b, t, d], the embeddings of some of the prompts."""
        return self._subjects[index.to(self._subjects.device)]

    @abstractmethod
    def lessons(self, generator: torch.Generator) -> list[Lesson]:
        """What to learn about the subjects; called without gradients."""

    def draw(self, generator: torch.Generator) -> list[Lesson]:
        """The lessons and, if concepts are preserved, one about them at the first lesson's latents."""
        lessons = self.lessons(generator)
        if self._preserved is None:
            return lessons
        first = lessons[0]
        index = torch.randint(0, self._preserved.shape[0], (first.latents.shape[0],), generator=generator)
        text = self._preserved[index.to(self._preserved.device)]
        still = self.denoiser.predict(first.latents, first.times, text)
        return [*lessons, Lesson(first.latents, first.times, text, still, self._preserve_weight)]

    def loss(self, drawn: list[Lesson]) -> Tensor:
        """The weighted sum of the lessons' mean squared errors, in float32."""
        total = torch.zeros((), device=drawn[0].latents.device)
        with self.room.trained():
            for lesson in drawn:
                predicted = self.denoiser.predict(lesson.latents, lesson.times, lesson.text)
                error = torch.nn.functional.mse_loss(predicted.float(), lesson.target.float())
                total = total + lesson.weight * error
        return total
