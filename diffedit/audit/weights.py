"""All tensors of a model on disk under canonical names, without loading the model.

A model is a diffusers folder, one component's folder, or a `.safetensors` file. Of each component the file that stock
diffusers would take is opened, and only its header is read; numbers come one tensor at a time, when asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from diffedit.audit.layouts import Piece, component_pieces, file_pieces, is_buffer
from diffedit.audit.tensors import DTYPES, TensorFile
from diffedit.errors import MalformedArtifactError, ModelNotFoundError, StorageError, UnsafeFormatError
from diffedit.io.strict import loads
from diffedit.storage import read_regular

_MAX_JSON = 1 << 24
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
_SAFETENSORS = ".safetensors"
_PLAIN = ("model", "diffusion_pytorch_model", "pytorch_model")
_COMPONENT = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


@dataclass(frozen=True)
class _Place:
    file: TensorFile
    piece: Piece

    @property
    def rows(self) -> tuple[int, int] | None:
        if self.piece.third is None:
            return None
        third = self.file.entries[self.piece.key].shape[0] // 3
        return self.piece.third * third, (self.piece.third + 1) * third


class Weights:
    """The tensors of one model. A context manager: leaving it closes the files.

    Args:
        path: a diffusers folder, a component's folder, or a `.safetensors` file.
        variant: of a diffusers folder, which files to take where there is a choice.

    Attributes:
        unread: component -> why its weights could not be looked at.

    Raises:
        ModelNotFoundError: the folder holds no weights of a pipeline, or the file is an adapter or an edit.
        UnsafeFormatError: there are pickles only.
        MalformedArtifactError: a damaged file.
        StorageError: the file system refused.
    """

    def __init__(self, path: Path, variant: str | None = None) -> None:
        self.unread: dict[str, str] = {}
        self._places: dict[str, _Place] = {}
        self._files = ExitStack()
        try:
            if path.is_dir():
                self._folder(path, variant)
            else:
                self._add(path, file_pieces)
            if not self._places:
                self._refuse_empty(path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        self._files.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of all tensors but for tables of positions, in the order of the files."""
        return tuple(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def dtype(self, name: str) -> str:
        """Safetensors' name of the stored dtype."""
        place = self._places[name]
        return place.file.entries[place.piece.key].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape; 1 x 1 convolutions are matrices, for that is how newer files store them."""
        place = self._places[name]
        shape = place.file.entries[place.piece.key].shape
        if place.rows is not None:
            shape = (place.rows[1] - place.rows[0], *shape[1:])
        return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape

    def readable(self, name: str) -> bool:
        """Whether the dtype is one that can be turned into numbers here."""
        return self.dtype(name) in DTYPES

    def raw(self, name: str) -> bytearray:
        """The stored bytes."""
        place = self._places[name]
        return place.file.raw(place.piece.key, place.rows)

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU, in the shape of `shape`."""
        place = self._places[name]
        return place.file.tensor(place.piece.key, place.rows).reshape(self.shape(name))

    def _folder(self, folder: Path, variant: str | None) -> None:
        index = folder / "model_index.json"
        if not index.is_file():
            for file in _weight_files(folder):
                self._add(file, file_pieces)
            return
        for component in sorted(_components(index)):
            place = folder / component
            if not place.is_dir():
                continue
            files = _weight_files(place, variant)
            for file in files:
                self._add(file, partial(component_pieces, component))
            if not files and any(item.suffix.lower() in _PICKLES for item in place.iterdir()):
                self.unread[component] = "its weights are pickles, which diffedit never opens"
        if not self._places and self.unread:
            raise UnsafeFormatError(
                "the folder holds its weights as pickles only",
                value=ascii(folder.name),
                hint="save it again with safe_serialization=True on a machine that you can lose",
            )

    def _add(self, path: Path, pieces: Callable[[Collection[str]], list[Piece]]) -> None:
        file = self._files.enter_context(TensorFile(path))
        _refuse_adapters(file)
        for piece in pieces(file.entries):
            entry = file.entries[piece.key]
            fits = piece.third is None or (entry.shape and entry.shape[0] % 3 == 0 and entry.shape[0] > 0)
            if not fits or piece.name in self._places:  # a name taken twice: both are kept, one under its own name
                piece = Piece(piece.key, piece.key)
            if not is_buffer(piece.name):
                self._places[piece.name] = _Place(file, piece)

    def _refuse_empty(self, path: Path) -> None:
        folder = path.is_dir()
        edit = folder and (path / "edit.safetensors").is_file()
        if folder and not edit and any(item.suffix.lower() in _PICKLES for item in path.iterdir()):
            raise UnsafeFormatError("the folder holds its weights as pickles only", value=ascii(path.name))
        raise ModelNotFoundError(
            "there are no weights to look at",
            value=ascii(path.name),
            cause="it holds an edit, not a model" if edit else None,
            hint="see `diffedit show` and `diffedit verify`" if edit else "give a diffusers folder or a checkpoint",
        )


def _components(index: Path) -> list[str]:
    """Names of the components that `model_index.json` lists with a class; they are a stranger's, so checked."""
    try:
        document = loads(read_regular(index, _MAX_JSON).decode("utf-8"), index.name)
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError("model_index.json cannot be read", cause=str(error)) from error
    if not isinstance(document, dict):
        raise MalformedArtifactError("model_index.json is no object", value=type(document).__name__)
    return [
        name
        for name, value in document.items()
        if _COMPONENT.fullmatch(name) and isinstance(value, list) and any(part is not None for part in value)
    ]


def _weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """What stock loaders would take: the variant, the plain file, the plain shards, or the only variant there is."""
    found = {item.name: item for item in sorted(folder.iterdir()) if item.name.endswith(_SAFETENSORS)}
    for stem in _PLAIN if variant else ():
        if f"{stem}.{variant}{_SAFETENSORS}" in found:
            return [found[f"{stem}.{variant}{_SAFETENSORS}"]]
    for stem in _PLAIN:
        if stem + _SAFETENSORS in found:
            return [found[stem + _SAFETENSORS]]
        index = folder / f"{stem}{_SAFETENSORS}.index.json"
        if index.is_file():
            return [folder / name for name in _shards(index)]
    if "edit.safetensors" in found:
        return []
    stems = {re.sub(r"-\d{5}-of-\d{5}$", "", name.removesuffix(_SAFETENSORS)) for name in found}
    if len(stems) > 1:
        raise ModelNotFoundError(
            "the folder holds several sets of weights and none is the plain one",
            value=", ".join(sorted(ascii(name) for name in found))[:200],
            hint="name the .safetensors file itself",
        )
    return list(found.values())


def _shards(index: Path) -> list[str]:
    try:
        document = loads(read_regular(index, _MAX_JSON).decode("utf-8"), index.name)
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError("the list of shards cannot be read", value=index.name, cause=str(error)) from error
    names = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise MalformedArtifactError("the list of shards is no list of shards", value=index.name)
    shards = sorted(set(names.values()))
    if any(not re.fullmatch(r"[A-Za-z0-9_.-]+\.safetensors", name) for name in shards):
        raise MalformedArtifactError("a shard lies outside its folder", value=ascii(shards)[:200])
    return shards


def _refuse_adapters(file: TensorFile) -> None:
    if "diffedit" in file.metadata and any(name.endswith(".up") for name in file.entries):
        raise ModelNotFoundError(
            "that is an edit, not a model",
            value=ascii(file.path.name),
            hint="see `diffedit show` and `diffedit verify`",
        )
    if _mostly(file.entries, ("lora_", ".lora.", "_lora.")):
        raise ModelNotFoundError(
            "that is an adapter, not a model",
            value=ascii(file.path.name),
            hint="merge it into its base and compare that, or load it with diffusers",
        )


def _mostly(names: Iterable[str], marks: tuple[str, ...]) -> bool:
    hits = [any(mark in name for mark in marks) for name in names]
    return bool(hits) and sum(hits) * 2 > len(hits)
