"""The measure that the paper uses: draw a picture per run and score it against the clean prompt.

    Phi(run) = cos(image(run), clean prompt)      CLIPScore without its constant (Hessel et al. 2021, arXiv 2104.08718)

All pictures of one prompt and seed start from the same latents. It costs a whole generation per state; the cheap
measures in `diffedit.locators.measures` exist because of that. Limits: it sees what the judge sees, and a judge that
does not know the concept finds no effect. Use another CLIP than the model's own text encoder.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, PrivateAttr

from diffedit.evaluate.scorer import Scorer
from diffedit.interfaces import Backend
from diffedit.intervention import TEXT_ENCODER, UNET, Runs
from diffedit.traceable import Measure, traceable


class ImageScore(Measure):
    """CLIPScore of a finished picture against the clean prompt.

    Attributes:
        scorer: `builtin:emoji-scorer`, or folder or Hub id of any transformers `CLIPModel`.
        steps: denoising steps; default: the model's own. Fewer are cheaper and coarser.
        guidance: classifier-free guidance scale; default: the model's own.
    """

    name = "image"
    reference = "CLIPScore, Hessel et al. 2021, arXiv 2104.08718"
    components: ClassVar[tuple[str, ...]] = (TEXT_ENCODER, UNET)
    least_total_effect: ClassVar[float] = 0.02

    scorer: str = "builtin:emoji-scorer"
    steps: int | None = Field(default=None, ge=1)
    guidance: float | None = Field(default=None, ge=0)

    _judge: Scorer | None = PrivateAttr(default=None)

    def measure(self, backend: Backend, runs: Runs, *, batch_size: int) -> list[float]:
        """One cosine per run."""
        if self._judge is None:
            self._judge = Scorer.load(self.scorer)
        images = traceable(backend).sample(runs, steps=self.steps, guidance=self.guidance, batch_size=batch_size)
        return [float(value) for value in self._judge.scores(images, [runs.caption])[:, 0]]

    def evaluations(self, backend: Backend, runs: int) -> int:
        """Both branches of guidance, in every step, for every run."""
        own = backend.model.sampling
        guidance = own.guidance if self.guidance is None else self.guidance
        return runs * (self.steps or own.steps) * (2 if guidance > 1 else 1)
