"""What the fine-tuning updaters have in common: settings, the scope they train in, and the way back to a `Delta`.

    theta' = train(theta),    D = theta' - theta per site,    up @ down = the best low-rank part of D

Training changes a weight in all directions a little, so the change is dense; `LowRank.from_dense` keeps the fewest
directions that hold `energy` of it (or `rank` of them), and what that costs is measured twice: as the relative error of
the matrix, and as the loss of the weights that the edit really makes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from diffedit.delta import Delta, LowRank, TrainingDiagnostics, Truncation
from diffedit.errors import NoOpError, RequestError
from diffedit.interfaces import Backend, Updater
from diffedit.request import Request
from diffedit.site import Location
from diffedit.updaters.finetune.checkpoint import Checkpoint, fingerprint
from diffedit.updaters.finetune.denoising import check_pipeline
from diffedit.updaters.finetune.scratch import Scratch, scratch
from diffedit.updaters.finetune.training import Objective, Progress, Schedule, Training, train


@dataclass(frozen=True, eq=False)
class Trained:
    """The result of `FineTune.train`.

    Attributes:
        delta: the change, low rank.
        training: how it went.
        loss: evaluation loss of the weights that `delta` makes; `training.after` is that of the dense change.
    """

    delta: Delta
    training: Training
    loss: float


class FineTune(Updater, ABC):
    """An updater that trains.

    Attributes:
        steps: training steps.
        learning_rate: of Adam; larger edits more in the same time, and damages more.
        batch_size: draws per step.
        preserve_weight: weight of the loss that holds the request's preserved concepts where they were; it counts only
            if there are any. The papers have no such term.
        energy: share of the change's squared singular values that the edit keeps, per site; less makes smaller files.
        rank: keep so many directions per site instead.
        clip_norm: largest norm of a gradient; default: no limit.
        evaluations: draws that the reported loss is the mean of.
        evaluate_every: steps between two evaluations.
        patience: stop after so many evaluations without a new lowest loss; default: never.
        stop_at: stop once the loss has fallen to this share of its first value; default: never.
        checkpoint_dir: folder for checkpoints, from which the same training goes on after an interruption; default:
            none. It is no part of the edit.
        checkpoint_every: steps between two checkpoints.
    """

    steps: int = Field(default=200, ge=1)
    learning_rate: float = Field(default=1e-5, ge=0, allow_inf_nan=False)
    batch_size: int = Field(default=1, ge=1)
    preserve_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    energy: float = Field(default=0.999, gt=0, le=1)
    rank: int | None = Field(default=None, ge=1)
    clip_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    evaluations: int = Field(default=4, ge=1)
    evaluate_every: int = Field(default=25, ge=1)
    patience: int | None = Field(default=None, ge=1)
    stop_at: float | None = Field(default=None, gt=0, lt=1)
    checkpoint_dir: Path | None = Field(default=None, exclude=True)
    checkpoint_every: int = Field(default=50, ge=1)

    _progress: Progress | None = PrivateAttr(default=None)

    def watched(self, progress: Progress | None) -> FineTune:
        """The same updater that calls `progress(steps done, steps in all, loss)` after every step."""
        copy = self.model_copy()
        copy._progress = progress
        return copy

    def components(self) -> tuple[str, ...]:
        """The pipeline components that run while it trains."""
        return ("text_encoder", "unet")

    @abstractmethod
    def objective(self, backend: Backend, requests: Sequence[Request], room: Scratch) -> Objective:
        """What to minimise for these requests."""

    def solve(self, backend: Backend, requests: Sequence[Request], location: Location) -> Delta:
        """Train, and return the change.

        Raises:
            NoOpError: training changed nothing.
        """
        return self.train(backend, requests, location).delta

    def train(self, backend: Backend, requests: Sequence[Request], location: Location) -> Trained:
        """Train the weights at a location; the model is as before when this returns or raises.

        Raises:
            NoOpError: training changed nothing.
            RequestError: requests of different strength.
            UnsupportedModelError, UnsupportedTensorError, NonFiniteError, StorageError: see `diffedit.errors`.
        """
        strengths = {request.strength for request in requests}
        if len(strengths) != 1:
            raise RequestError(
                f"{self.name} trains all requests together", value=f"strengths {sorted(strengths)}", hint="use one"
            )
        check_pipeline(backend, unet="unet" in self.components())
        with scratch(backend, location.sites, self.components()) as room:
            objective = self.objective(backend, requests, room)
            schedule = self._schedule(requests[0].seed)
            place = self._checkpoint(backend, requests, location)
            training, evaluate = train(objective, room, schedule, checkpoint=place, progress=self._progress)
            changes = {site: change for site, change in room.changes().items() if bool(change.any())}
            if not changes:
                raise NoOpError("training changed nothing", value=f"{training.steps} steps", hint="raise learning_rate")
            kept = {site: self._truncate(change) for site, change in changes.items()}
            room.set_changes({site: part.low_rank.dense() for site, part in kept.items()})
            loss = evaluate()
        diagnostics = {
            site: TrainingDiagnostics(
                steps=training.steps,
                loss_before=training.before,
                loss_trained=training.after,
                loss_after=loss,
                truncation_error=part.error,
                relative_norm=_norm(changes[site]) / (_norm(backend.weight(site)) or float("inf")),
            )
            for site, part in kept.items()
        }
        strength = strengths.pop()
        factors = {site: part.low_rank.scale(strength).to(torch.float32) for site, part in kept.items()}
        return Trained(Delta(factors, diagnostics), training, loss)

    def _truncate(self, change: Tensor) -> Truncation:
        if self.rank is not None:
            return LowRank.from_dense(change, rank=self.rank)
        return LowRank.from_dense(change, energy=self.energy)

    def _schedule(self, seed: int) -> Schedule:
        fields = ("steps", "learning_rate", "clip_norm", "evaluations", "evaluate_every", "patience", "stop_at")
        return Schedule(
            seed=seed, checkpoint_every=self.checkpoint_every, **{field: getattr(self, field) for field in fields}
        )

    def _checkpoint(self, backend: Backend, requests: Sequence[Request], location: Location) -> Checkpoint | None:
        if self.checkpoint_dir is None:
            return None
        settings = self.model_dump(mode="json", exclude={"checkpoint_every", "energy", "rank"})
        facts = {
            "settings": settings,
            "requests": [request.model_dump(mode="json") for request in requests],
            "sites": [site.name for site in location.sites],
            "sampling": vars(backend.model.sampling),
        }
        modules = [getattr(backend.model.pipeline, name) for name in self.components()]
        return Checkpoint(self.checkpoint_dir, self.name, fingerprint(facts, modules))


def prompts_of(request: Request, phrase: str) -> list[str]:
    """The request's templates filled with a phrase."""
    return [prompt for prompt, _ in request.render(phrase)]


def target_of(request: Request) -> str:
    """The request's target.

    Raises:
        RequestError: it has none.
    """
    if request.target is None:
        raise RequestError("the request has no target yet", value=repr(request.subject), hint="name one")
    return request.target


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix.detach(), dtype=torch.float64))
