"""Checkpoints of a training: everything that the next step depends on, in one safetensors file, written atomically.

The file's name carries a fingerprint of the whole task (settings, requests, sites, every weight of the components that
run), so that a checkpoint is only ever found by the training it belongs to, and a folder can serve many. It is written
beside its place, flushed to the disk and renamed: an interrupted write leaves the checkpoint before it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from diffedit.errors import MalformedArtifactError, StorageError

_KEY = "diffedit.training"


@dataclass(frozen=True, eq=False)
class State:
    """What is in a checkpoint.

    Attributes:
        numbers: JSON-able facts: steps done, losses seen.
        tensors: parameters, moments of the optimiser, the generator's state, what the objective keeps.
    """

    numbers: dict[str, Any]
    tensors: dict[str, Tensor]


class Checkpoint:
    """One training's place on disk.

    Args:
        folder: where checkpoints go; made when first needed.
        name: of the updater.
        fingerprint: of the task.
    """

    def __init__(self, folder: Path, name: str, fingerprint: str) -> None:
        self.path = folder.expanduser() / f"{name}-{fingerprint[:16]}.safetensors"

    def load(self) -> State | None:
        """The last state that was saved, or `None`.

        Raises:
            MalformedArtifactError: there is a file that is no checkpoint.
            StorageError: it cannot be read.
        """
        try:
            if not self.path.exists():
                return None
            with safe_open(self.path, framework="pt") as file:
                numbers = json.loads(file.metadata()[_KEY])
                return State(numbers, {key: file.get_tensor(key).clone() for key in file.keys()})
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise MalformedArtifactError(
                "the checkpoint cannot be read",
                value=str(self.path),
                cause=str(error),
                hint="delete it and train again",
            ) from error
        except OSError as error:
            raise _refused(self.path, error) from error

    def save(self, state: State) -> None:
        """Replace what was saved before.

        Raises:
            StorageError: the file system refused; the checkpoint before stays.
        """
        data = save(
            {key: value.contiguous() for key, value in state.tensors.items()}, {_KEY: json.dumps(state.numbers)}
        )
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            raise _refused(self.path, error) from error
        finally:
            with suppress(OSError):
                temporary.unlink()


def fingerprint(facts: Mapping[str, Any], modules: Sequence[nn.Module]) -> str:
    """SHA-256 over facts (JSON) and every number of the modules."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            data = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _refused(path: Path, error: OSError) -> StorageError:
    return StorageError(
        "the file system refused the checkpoint",
        value=str(path),
        cause=error.strerror,
        hint="choose another checkpoint_dir",
    )
