"""The training loop that all fine-tuning baselines share: Adam on a few weights, one generator, fixed evaluation draws.

    theta <- theta - Adam(grad of mean loss of `batch_size` draws),       theta: the weights at the edit sites

The loss that is reported, and that early stopping looks at, is not that of the training draws, which jumps with the
noise, but of draws made once, before the first step, from the original model: "before" and "after" are then about the
same noise. A run is determined by its seed, and one that was interrupted goes on from its checkpoint as if nothing had
happened: parameters, moments, step and the generator's state are all there.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffedit.errors import NonFiniteError
from diffedit.updaters.finetune.checkpoint import Checkpoint, State
from diffedit.updaters.finetune.scratch import Scratch

logger = logging.getLogger("diffedit")

Progress = Callable[[int, int, float], None]
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Objective(ABC):
    """What one method minimises. Everything random comes from the generator that `draw` is given."""

    def prepare(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Make what all steps share (pictures of an anchor, say), or take it from a checkpoint; returns it to store."""
        return {}

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Any:
        """The data of one step: noise, timesteps, prompts, and what the teacher says of them; no gradients."""

    @abstractmethod
    def loss(self, drawn: Any) -> Tensor:
        """The scalar loss of the trained weights on drawn data."""


@dataclass(frozen=True)
class Schedule:
    """How to train; see `FineTune` for the meaning of each."""

    steps: int
    learning_rate: float
    seed: int
    clip_norm: float | None = None
    evaluations: int = 4
    evaluate_every: int = 25
    patience: int | None = None
    stop_at: float | None = None
    checkpoint_every: int = 50


@dataclass(frozen=True)
class Training:
    """How a training went.

    Attributes:
        steps: that were done, those before an interruption included.
        before: evaluation loss of the original weights.
        after: evaluation loss of the trained weights.
        history: (step, evaluation loss), from step 0.
    """

    steps: int
    before: float
    after: float
    history: tuple[tuple[int, float], ...]


def train(
    objective: Objective,
    room: Scratch,
    schedule: Schedule,
    *,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> tuple[Training, Callable[[], float]]:
    """Minimise an objective over the weights in a scratch.

    Args:
        objective: what to minimise.
        room: the weights.
        schedule: how.
        checkpoint: where to keep the state, and to go on from.
        progress: called after every step with (steps done, steps in all, loss of that step's draw).

    Returns:
        How it went, and a function that gives the evaluation loss of whatever the scratch holds when it is called.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
        StorageError, MalformedArtifactError: see `Checkpoint`.
    """
    saved = checkpoint.load() if checkpoint else None
    stored = {key.removeprefix("kept."): value for key, value in (saved.tensors if saved else {}).items()}
    kept = objective.prepare(stored)
    with torch.no_grad():
        generator = _generator(schedule.seed, 1)
        draws = [objective.draw(generator) for _ in range(schedule.evaluations)]

    def evaluate() -> float:
        with torch.no_grad():
            return math.fsum(float(objective.loss(drawn)) for drawn in draws) / len(draws)

    generator = _generator(schedule.seed, 0)
    optimiser = torch.optim.Adam(room.parameters, lr=schedule.learning_rate)
    history = [(0, evaluate())]
    step = 0
    if saved:
        step, history = _resume(saved, room, optimiser, generator)
    elif checkpoint:
        checkpoint.save(_state(step, history, room, optimiser, generator, kept))
    while step < schedule.steps and not _enough(history, schedule):
        with torch.no_grad():
            drawn = objective.draw(generator)
        loss = objective.loss(drawn)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(
                "the training diverged", value=f"loss {value} at step {step + 1}", hint="lower learning_rate"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if schedule.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(room.parameters, schedule.clip_norm)
        optimiser.step()
        step += 1
        if step % schedule.evaluate_every == 0 or step == schedule.steps:
            history.append((step, evaluate()))
            logger.info("step %d of %d: loss %.6g (at first %.6g)", step, schedule.steps, history[-1][1], history[0][1])
        if checkpoint and (step % schedule.checkpoint_every == 0 or step == schedule.steps):
            checkpoint.save(_state(step, history, room, optimiser, generator, kept))
        if progress:
            progress(step, schedule.steps, value)
    return Training(step, history[0][1], history[-1][1], tuple(history)), evaluate


def _enough(history: list[tuple[int, float]], schedule: Schedule) -> bool:
    losses = [loss for _, loss in history]
    if schedule.stop_at is not None and losses[-1] <= schedule.stop_at * losses[0]:
        return True
    if schedule.patience is None:
        return False
    return len(losses) - 1 - losses.index(min(losses)) >= schedule.patience


def _generator(seed: int, stream: int) -> torch.Generator:
    """Independent streams of one seed: 0 for the steps, 1 for evaluation, 2 for what is prepared."""
    return torch.Generator().manual_seed((seed * 3 + stream) % 2**63)


def preparation_generator(seed: int) -> torch.Generator:
    """The random numbers of `Objective.prepare`."""
    return _generator(seed, 2)


def _state(
    step: int,
    history: list[tuple[int, float]],
    room: Scratch,
    optimiser: torch.optim.Adam,
    generator: torch.Generator,
    kept: Mapping[str, Tensor],
) -> State:
    tensors = {f"kept.{key}": value.detach().cpu() for key, value in kept.items()}
    tensors["generator"] = generator.get_state()
    for index, parameter in enumerate(room.parameters):
        tensors[f"parameter.{index}"] = parameter.detach().cpu()
        for key in _MOMENTS if optimiser.state[parameter] else ():
            tensors[f"{key}.{index}"] = optimiser.state[parameter][key].cpu()
    return State({"step": step, "history": history}, tensors)


def _resume(
    saved: State, room: Scratch, optimiser: torch.optim.Adam, generator: torch.Generator
) -> tuple[int, list[tuple[int, float]]]:
    """Put everything back as it was when the checkpoint was written."""
    step = int(saved.numbers["step"])
    generator.set_state(saved.tensors["generator"])
    with torch.no_grad():
        for index, parameter in enumerate(room.parameters):
            parameter.copy_(saved.tensors[f"parameter.{index}"])
            if f"{_MOMENTS[0]}.{index}" in saved.tensors:
                moments = {key: saved.tensors[f"{key}.{index}"].to(parameter.device) for key in _MOMENTS}
                optimiser.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    logger.info("going on from step %d", step)
    return step, [(int(at), float(loss)) for at, loss in saved.numbers["history"]]
