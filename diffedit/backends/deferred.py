"""A pipeline whose UNet, VAE and other parts stay on the disk until something looks at them.

An edit of the text encoder needs the text encoder, its tokenizer and nothing else: at Stable Diffusion 1.x size one
eighth of the weights. So a model that is opened from files is opened with those alone, and *completes itself* the
moment anything else of it is touched: `pipeline.unet`, `pipeline.components`, a call, whatever. Code that is handed
such a pipeline needs to know nothing about it. Completing keeps the very text encoder object, edits included.

How: the pipeline is an instance of a subclass of its own class whose `__getattribute__` lets text encoders, tokenizers
and the scheduler through and completes before anything else. Completing builds the whole pipeline by the stock loader,
takes over its attributes and sets `__class__` back, so that afterwards it is an ordinary pipeline, at no cost.

Limits: the files must be there, and be the same ones, until then; if they are not, completing is an error and the
pipeline stays as it is. Two threads may complete at once; one of them does it.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffedit.errors import ModelNotFoundError

_KEY = "_diffedit_unread"
_READ = re.compile(r"(?:text_encoder|tokenizer)(?:_\d+)?|scheduler|__\w+__")

Stamp = tuple[str, int, int]


@dataclass(frozen=True, eq=False)
class Unread:
    """What a pipeline has not read yet.

    Attributes:
        names: components that are still on the disk.
        source: the folder or the single file that they are in.
        load: from the components that are in memory, by name, to the whole pipeline.
        stamps: path, size and time of the files when the model was opened.
        variant: which files of a folder are loaded where there is a choice.
    """

    names: frozenset[str]
    source: Path
    load: Callable[[Mapping[str, Any]], Any]
    stamps: tuple[Stamp, ...]
    variant: str | None = None
    lock: Any = field(default_factory=threading.RLock)

    def check(self) -> None:
        """Raise `ModelNotFoundError` unless the files are those that were there when the model was opened."""
        if stamp(Path(path) for path, _, _ in self.stamps) != self.stamps:
            raise ModelNotFoundError(
                "the model's files changed since it was opened",
                value=repr(self.source.name),
                cause=f"{', '.join(sorted(self.names))} had not been read yet",
                hint="open the model again; a saved edit can be loaded onto it",
            )


def stamp(paths: Iterable[Path]) -> tuple[Stamp, ...]:
    """Path, size and modification time of files; a file that is gone has size and time -1."""
    found = []
    for path in sorted(paths):
        try:
            status = os.stat(path)
            found.append((str(path), status.st_size, status.st_mtime_ns))
        except OSError:
            found.append((str(path), -1, -1))
    return tuple(found)


def defer(pipeline: Any, unread: Unread) -> Any:
    """Make a pipeline without some of its parts complete itself when it has to; returns the same object."""
    base: Any = type(pipeline)

    def getattribute(self: Any, name: str) -> Any:
        if _READ.fullmatch(name) is None:
            complete(self)
            return getattr(self, name)
        return base.__getattribute__(self, name)

    members = {"__getattribute__": getattribute, "__module__": base.__module__, "__doc__": base.__doc__}
    kind = type(base.__name__, (base,), members)
    vars(pipeline)[_KEY] = unread
    object.__setattr__(pipeline, "__class__", kind)
    return pipeline


def unread(pipeline: Any) -> Unread | None:
    """What a pipeline has not read yet; `None` for one that is whole."""
    found: Unread | None = getattr(pipeline, "__dict__", {}).get(_KEY)
    return found


def in_memory(pipeline: Any) -> dict[str, Any]:
    """The components by name, without those that are still on the disk; those that the model lacks are `None`."""
    state = unread(pipeline)
    if state is None:
        return dict(pipeline.components)
    attributes = vars(pipeline)
    return {
        name: attributes[name]
        for name, described in attributes["_internal_dict"].items()
        if isinstance(described, list | tuple) and name in attributes and name not in state.names
    }


def complete(pipeline: Any) -> Any:
    """The same pipeline with everything in memory.

    Raises:
        ModelNotFoundError: the rest cannot be loaded, or its files changed since the model was opened.
    """
    state = unread(pipeline)
    if state is None:
        return pipeline
    with state.lock:
        attributes = vars(pipeline)
        if _KEY not in attributes:  # another thread was faster
            return pipeline
        state.check()
        kept = {
            name: part
            for name, part in attributes.items()
            if _READ.fullmatch(name) and name not in state.names and part is not None
        }
        whole = state.load(kept)
        device = getattr(kept.get("text_encoder"), "device", None)
        if device is not None and device.type != "cpu":
            whole.to(device)
        attributes.update(vars(whole))
        object.__setattr__(pipeline, "__class__", type(whole))
        del attributes[_KEY]
    return pipeline
