"""Pictures of the anchor (the request's target), made by the model itself before training, kept as latents.

Each is sampled from a prompt with the anchor in it; training then adds noise to it and asks what the model predicts
there. No VAE is needed, and a checkpoint holds them, so that an interrupted training makes them once.

Shapes: pictures [n, c, h, w], captions [n] (index of the prompt), texts [p, t, d].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffedit.errors import MalformedArtifactError
from diffedit.updaters.finetune.denoising import Denoiser
from diffedit.updaters.finetune.training import preparation_generator

_TOGETHER = 8


@dataclass(frozen=True, eq=False)
class View:
    """Some of the pictures with noise added.

    Attributes:
        captions: [b], the prompts they were made for.
        text: [b, t, d], embeddings of these prompts.
        latents: [b, c, h, w], x_t.
        times: [b], t.
        truth: [b, c, h, w], what a perfect model would predict there.
    """

    captions: Tensor
    text: Tensor
    latents: Tensor
    times: Tensor
    truth: Tensor


class Anchors:
    """The pictures of some prompts.

    Args:
        denoiser: the model.
        texts: [p, t, d], embeddings of the prompts.
        count: pictures in all, spread evenly over the prompts.
        guidance: guidance scale they are sampled with.
        seed: of the starting noise.
    """

    def __init__(self, denoiser: Denoiser, texts: Tensor, count: int, guidance: float, seed: int) -> None:
        self._denoiser, self._texts, self._guidance, self._seed = denoiser, texts, guidance, seed
        prompts = len(texts)
        every = torch.arange(count)
        self._captions = every % prompts if count > prompts else every * prompts // count
        self._pictures: Tensor | None = None

    def prepare(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Sample the pictures, unless a checkpoint holds them; returns what to store.

        Raises:
            MalformedArtifactError: the checkpoint holds another number of pictures.
        """
        if "pictures" not in stored:
            generator = preparation_generator(self._seed)
            made = [
                self._denoiser.sample(
                    self._text(captions), self._denoiser.noise(len(captions), generator), guidance=self._guidance
                )
                for captions in torch.split(self._captions, _TOGETHER)
            ]
            self._pictures = torch.cat(made)
        elif len(stored["pictures"]) != len(self._captions):
            raise MalformedArtifactError("the checkpoint holds other pictures", value=len(stored["pictures"]))
        else:
            self._pictures = stored["pictures"].to(self._texts.device)
        return {"pictures": self._pictures}

    def view(self, n: int, generator: torch.Generator) -> View:
        """`n` pictures, each at a random timestep; they are made now if `prepare` was not called."""
        pictures = self.prepare({})["pictures"] if self._pictures is None else self._pictures
        chosen = torch.randint(0, len(pictures), (n,), generator=generator)
        clean = pictures[chosen.to(pictures.device)]
        noise, times = self._denoiser.noise(n, generator), self._denoiser.random_times(n, generator)
        captions = self._captions[chosen]
        return View(
            captions,
            self._text(captions),
            self._denoiser.add_noise(clean, noise, times),
            times,
            self._denoiser.truth(clean, noise, times),
        )

    def _text(self, captions: Tensor) -> Tensor:
        return self._texts[captions.to(self._texts.device)]
