"""Whether a place already holds what saving an edited model there would write: seen by content, not by a record.

A run over many models that was interrupted starts again from the same command. What it finished is recognised by
comparing, so nothing has to be remembered, and nothing that is remembered can be wrong. Three answers:

    done         every byte is what would be written (for weights in memory: every value, as `component` compares)
    incomplete   something is missing or cut short, and what is there agrees: an interrupted copy of the same
    different    it is something else

Reads the base's files and the place's once each and writes nothing. UNet and VAE of a model that did not read them are
compared file by file, without building them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from diffedit.backends.checkpoint import patches
from diffedit.backends.component import WEIGHTS, copied_names, holds
from diffedit.backends.deferred import in_memory, unread
from diffedit.backends.families import INDEX
from diffedit.backends.saving import loose_files, source_folder
from diffedit.backends.tensorfile import CHUNK, TensorFile, encode
from diffedit.errors import MalformedArtifactError, UnsupportedModelError
from diffedit.interfaces import Backend

State = Literal["done", "incomplete", "different"]

_MADE_READABLE = ("tokenizer", "text_encoder")  # folders in which saving may write more, or other, than the base has


def saved_state(backend: Backend, path: Path) -> State:
    """What lies at `path`, seen from the live model.

    Args:
        backend: the edited model; it came from a folder or from a single file.
        path: an existing folder or file.

    Raises:
        UnsupportedModelError: the model came from neither, so that its copy cannot be recognised.
        DiffEditError: the base's files cannot be read.
        OSError: the file system refused.
    """
    if backend.model.file is not None and path.suffix.lower() == backend.model.file.suffix.lower():
        source, new, _ = patches(backend, backend.model.file)
        return _compare(source.path, path, _ranges(source, new)) if path.is_file() else "different"
    pipeline = backend.model.pipeline
    waiting = unread(pipeline)
    base = source_folder(pipeline) if waiting is None else waiting.source
    if base is None or not base.is_dir():
        raise UnsupportedModelError("the model did not come from a folder", value=backend.model.source)
    return _folder_state(backend, base, path)


def _folder_state(backend: Backend, base: Path, path: Path) -> State:
    if not path.is_dir():
        return "different"
    variant = backend.model.variant
    modules = {name for name, part in in_memory(backend.model.pipeline).items() if isinstance(part, nn.Module)}
    found: set[State] = set()
    places = _copied(base, variant, modules)
    for name, file in places.items():
        weights = file.suffix.lower() in WEIGHTS
        in_module = len(name.parts) > 1 and name.parts[0] in modules
        if (weights and (in_module or len(name.parts) == 1)) or (in_module and name.name.endswith(".index.json")):
            continue  # the former are compared by value, and loose weights beside the index are not carried over
        found.add(_compare(file, path / name, {}))
    for file in _files(path):
        name = file.relative_to(path)
        if name not in places and not name.parts[0].startswith(_MADE_READABLE):
            found.add("different")
    for component, part in sorted(in_memory(backend.model.pipeline).items()):
        if isinstance(part, nn.Module):
            found.add(_module_state(part, base / component, path / component))
    if not (path / INDEX).is_file() and not any(_files(path)):
        return "incomplete"
    return "different" if "different" in found else "incomplete" if "incomplete" in found else "done"


def _copied(base: Path, variant: str | None, modules: Collection[str]) -> dict[Path, Path]:
    """Name in the copy -> file of the base, weights included that are not carried over."""
    loose = loose_files(base, variant)
    own = {file.name for file in loose.values()}
    found = {file.relative_to(base): file for file in _files(base) if file.parent != base or file.name not in own}
    for folder in sorted(path for path in base.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if folder.name not in modules:
            for file in _files(folder):
                del found[file.relative_to(base)]
        found |= {Path(folder.name) / name: file for name, file in copied_names(folder, variant).items()}
    return found | {Path(name): file for name, file in loose.items()}


def _module_state(module: nn.Module, base: Path, path: Path) -> State:
    if not path.is_dir():
        return "incomplete"
    try:
        return "done" if holds(module, path) else "different"
    except MalformedArtifactError:
        short = any((path / file.name).is_file() and _size(path / file.name) < _size(file) for file in _files(base))
        return "incomplete" if short else "different"


def _ranges(source: TensorFile, new: Mapping[str, Tensor]) -> dict[int, bytes]:
    """First byte in the file -> what stands there instead."""
    entries = {name: (source.entries[name], value) for name, value in new.items()}
    return {source.data + entry.start: encode(name, entry, value) for name, (entry, value) in entries.items()}


def _compare(base: Path, path: Path, patched: Mapping[int, bytes]) -> State:
    """A file against the base's with some ranges replaced, in one pass of bounded memory."""
    if not path.is_file():
        return "incomplete"
    size, length = _size(base), _size(path)
    if length > size:
        return "different"
    with base.open("rb") as one, path.open("rb") as other:
        for start in range(0, length, CHUNK):
            wanted, seen = bytearray(one.read(CHUNK)), other.read(CHUNK)
            for at, data in patched.items():
                first, last = max(at, start), min(at + len(data), start + len(wanted))
                if first < last:
                    wanted[first - start : last - start] = data[first - at : last - at]
            if seen != wanted[: len(seen)]:
                return "different"
    return "done" if length == size else "incomplete"


def _size(path: Path) -> int:
    return path.stat().st_size


def _files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
