"""Other programs' safetensors files: read the header, read one tensor, copy the file with a few tensors replaced.

The format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, offsets), the tensors' bytes.
`copy_patched` streams the file, so its memory is one chunk plus the replaced tensors, and leaves every byte outside
their ranges as it is: header, padding, order, metadata. Only when tensors get new names is the header written anew.

Nothing is mapped: a mapped file that another process truncates kills the reader. Unlike `io.container`, which reads
edits and accepts one canonical form only, this reads what checkpoints look like in the wild.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from diffedit.errors import MalformedArtifactError, SwallowedError, UnsupportedTensorError

CHUNK = 16 << 20
MAX_HEADER = 100_000_000  # the limit of the official reader
KEPT = 0.9  # share of a change that has to survive the rounding to the file's dtype

FLOATS: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        dtype: as the file spells it ("F32").
        shape: its shape.
        start: first byte, counted from the start of the data.
        stop: one past its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header was read.

    Attributes:
        path: where it is.
        entries: tensors by name, in the header's order.
        metadata: the header's text entries.
        data: position of the first data byte in the file.
    """

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data: int

    def read(self, name: str) -> Tensor:
        """One floating-point tensor, in memory of its own, in the file's dtype.

        Raises:
            UnsupportedTensorError: it is not floating-point.
        """
        entry = self.entries[name]
        if entry.dtype not in FLOATS:
            raise UnsupportedTensorError(f"{name} is not floating-point", value=entry.dtype)
        buffer = bytearray(entry.stop - entry.start)
        with self.path.open("rb") as file:
            file.seek(self.data + entry.start)
            if file.readinto(buffer) != len(buffer):
                raise _malformed(self.path, "is cut short", name)
        if not buffer:
            return torch.empty(entry.shape, dtype=FLOATS[entry.dtype])
        return torch.frombuffer(buffer, dtype=FLOATS[entry.dtype]).reshape(entry.shape)


def open_tensors(path: Path) -> TensorFile:
    """Read the header of a safetensors file.

    Raises:
        MalformedArtifactError: it is no such file, or is cut short.
        OSError: the file system refused.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise _malformed(path, "is no safetensors file, or is cut short", f"{size} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        metadata = dict(header.pop(_METADATA, {}))
        entries = {name: _entry(value) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _malformed(path, "has a header that is no valid safetensors header", str(error)[:200]) from error
    for name, entry in entries.items():
        bits = _BITS.get(entry.dtype)
        fits = bits is None or (entry.stop - entry.start) * 8 == bits * math.prod(entry.shape)
        if not 0 <= entry.start <= entry.stop <= size - 8 - length or not fits:
            raise _malformed(path, "has a tensor whose place does not fit", ascii(name)[:120])
    return TensorFile(path, entries, metadata, 8 + length)


def copy_patched(
    source: TensorFile, target: Path, tensors: Mapping[str, Tensor], names: Mapping[str, str] | None = None
) -> None:
    """Write a copy of a file with some tensors replaced; everything else stays byte for byte.

    Args:
        source: the file to copy.
        target: where to, not there yet.
        tensors: name in the source -> new values, of the same shape, cast to the file's dtype.
        names: old name -> new name for tensors that are to be renamed; then the header is written anew.

    Raises:
        UnsupportedTensorError: a shape or dtype does not fit.
        OSError: the file system refused.
    """
    patches = [(source.entries[name], encode(name, source.entries[name], value)) for name, value in tensors.items()]
    with source.path.open("rb") as reader, target.open("xb") as writer:
        if names:
            start = _write_header(source, names, writer)
            reader.seek(source.data)
        else:
            start = source.data
        shutil.copyfileobj(reader, writer, CHUNK)
        for entry, data in patches:
            writer.seek(start + entry.start)
            writer.write(data)


def encode(name: str, entry: Entry, value: Tensor) -> bytes:
    """The bytes that stand at `entry` when its tensor is `value`.

    Raises:
        UnsupportedTensorError: the shape or the dtype does not fit.
    """
    dtype = FLOATS.get(entry.dtype)
    if dtype is None or tuple(value.shape) != entry.shape:
        raise UnsupportedTensorError(
            f"{name} cannot be replaced", value=f"{entry.dtype} {entry.shape} by {value.dtype} {tuple(value.shape)}"
        )
    flat = value.detach().cpu().to(dtype).contiguous().reshape(-1).view(_INTEGERS[dtype.itemsize])
    return flat.numpy().astype(f"<i{dtype.itemsize}", copy=False).tobytes()


def in_file_dtype(name: str, live: Tensor, stored: Tensor) -> Tensor:
    """`live` cast to the dtype of `stored`, the value that it replaces.

    Raises:
        UnsupportedTensorError: the shapes differ.
        SwallowedError: less than `KEPT` of the change survives the cast.
    """
    if live.shape != stored.shape:
        shapes = f"{tuple(live.shape)} in the model, {tuple(stored.shape)} in the file"
        raise UnsupportedTensorError(f"{name} has another shape in the file", value=shapes)
    cast = live.detach().cpu().to(stored.dtype)
    base = stored.double()
    asked, got = live.detach().cpu().double() - base, cast.double() - base
    total = float((asked * asked).sum())
    kept = float((asked * got).sum()) / total if total else 1.0
    if not kept >= KEPT:
        raise SwallowedError(
            f"{name} is stored in {stored.dtype}, which keeps too little of the change",
            value=f"{kept:.1%} of it, at least {KEPT:.0%} is needed",
            cause="the change is smaller than the dtype's rounding step",
            hint="start from a float32 copy of the model",
        )
    return cast


def same_values(live: Tensor, stored: Tensor) -> bool:
    """Whether two tensors are one tensor, up to the rounding of the narrower of their dtypes; to the bit."""
    if live.shape != stored.shape:
        return False
    narrow = min((stored.dtype, live.dtype), key=lambda dtype: dtype.itemsize)
    one, other = (value.detach().cpu().contiguous().to(narrow) for value in (live, stored))
    return torch.equal(one.view(_INTEGERS[narrow.itemsize]), other.view(_INTEGERS[narrow.itemsize]))


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BITS = {"BF16": 16, "F16": 16, "F32": 32, "F64": 64, "I8": 8, "U8": 8, "I16": 16, "I32": 32, "I64": 64, "BOOL": 8}


def _write_header(source: TensorFile, names: Mapping[str, str], writer: BinaryIO) -> int:
    """The header with new names, padded as the format wants it. Returns where the data starts."""
    header: dict[str, Any] = {_METADATA: dict(source.metadata)} if source.metadata else {}
    for name, entry in source.entries.items():
        place = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start, entry.stop]}
        if header.setdefault(names.get(name, name), place) is not place:
            raise _malformed(source.path, "would have a tensor twice", names.get(name, name))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    writer.write(len(text).to_bytes(8, "little") + text)
    return 8 + len(text)


def _entry(value: Any) -> Entry:
    start, stop = value["data_offsets"]
    shape = tuple(value["shape"])
    if not all(type(number) is int for number in (start, stop, *shape)) or not isinstance(value["dtype"], str):
        raise ValueError(f"not an entry: {ascii(value)[:120]}")
    return Entry(value["dtype"], shape, start, stop)


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(items)
    if len(out) != len(items):
        raise ValueError("a name stands twice")
    return out


def _malformed(path: Path, what: str, value: str) -> MalformedArtifactError:
    return MalformedArtifactError(f"{path.name} {what}", value=value, hint="download or save the file again")
