"""The plugin contract of causal tracing: backends that can be intervened in, and measures of what a run shows.

Apart from `diffedit.interfaces` because most plugins need neither: a backend that edits but cannot be traced leaves
`Traceable` out, and an author of a measure needs nothing of locators or updaters. Third parties register measures by
entry point in the group `diffedit.measures`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from diffedit.errors import UnsupportedModelError
from diffedit.interfaces import Backend, Plugin
from diffedit.intervention import Part, Patch, Runs, TextRuns

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class Traceable(ABC):
    """What a `Backend` offers besides if its model can be traced. Nothing here changes the model or keeps a hook."""

    @abstractmethod
    def parts(self, component: str) -> tuple[Part, ...]:
        """The parts of a component that a run can restore, in running order.

        Raises:
            UnsupportedModelError: the model has no such component, or nothing in it can be restored.
        """

    @abstractmethod
    def embedding_scale(self) -> tuple[int, float]:
        """Width of the text encoder's word embeddings and the standard deviation of all their entries."""

    @abstractmethod
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """[b, t, d], what conditions the image model for each prompt, padded as the pipeline does."""

    @abstractmethod
    def encode_runs(
        self, prompt: str, noise: Tensor, start: int, patches: Sequence[Patch], *, max_rows: int = 128
    ) -> TextRuns:
        """Run the text encoder clean, corrupted, and restored once per patch.

        Args:
            prompt: the clean prompt.
            noise: [s, e], added to the word embeddings of the positions `start` to `start + s`.
            start: first corrupted position, counted with the begin-of-text token at 0.
            patches: what each restored run takes from the clean run.
            max_rows: runs computed together; bounds the memory.

        Raises:
            UnsupportedModelError: a part is not of this text encoder.
        """

    @abstractmethod
    def predict(self, runs: Runs, timesteps: Sequence[float], *, batch_size: int) -> Tensor:
        """[n, k, c, h, w] float32, the denoiser's conditional prediction of each run at each timestep.

        Args:
            runs: n runs; `runs.seed` draws the latents, one per timestep, the same for all runs.
            timesteps: k shares of the schedule's length in [0, 1); 0 is the cleanest.
            batch_size: runs computed together.
        """

    @abstractmethod
    def sample(self, runs: Runs, *, steps: int | None, guidance: float | None, batch_size: int) -> list[Image]:
        """One image per run, all from the same starting latents; `None` takes the model's own sampling."""

    @abstractmethod
    def batch_limit(self, memory: int | None = None) -> int:
        """How many runs fit into the memory at once.

        Args:
            memory: bytes that may be used; default: half of what the device has free.
        """

    @abstractmethod
    def digest(self) -> str:
        """Hex digest that changes when the weights do; recognises an interrupted trace as one of the same model."""


def traceable(backend: Backend) -> Traceable:
    """The backend as something to trace.

    Raises:
        UnsupportedModelError: it cannot be.
    """
    if not isinstance(backend, Traceable):
        raise UnsupportedModelError(
            f"the backend {backend.name} cannot be traced",
            cause="it does not implement diffedit.Traceable",
            hint="choose the site yourself with the locator 'fixed'",
        )
    return backend


class Measure(Plugin, ABC):
    """How much of the concept each run shows: a number per run, higher for more.

    Attributes:
        components: the components whose traces it can judge.
        least_total_effect: smallest mean difference between run 0 and run 1 that is worth explaining.
    """

    components: ClassVar[tuple[str, ...]]
    least_total_effect: ClassVar[float]

    @abstractmethod
    def measure(self, backend: Backend, runs: Runs, *, batch_size: int) -> list[float]:
        """One number per run; a run's number depends on that run and run 0 alone."""

    @abstractmethod
    def evaluations(self, backend: Backend, runs: int) -> int:
        """How many rows of the denoiser `measure` computes for so many runs; for estimates of time."""
