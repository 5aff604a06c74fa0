"""Tensors of a checkpoint, one at a time: a safetensors reader that never holds or maps the whole file.

    8 bytes little-endian header length, a JSON header, the tensors' bytes

An audit reads files of strangers that are gigabytes long. The official reader maps a file into memory, where another
process that truncates it kills the reader, and accepts headers that two programs understand differently (a name twice).
So the header is parsed strictly here, every byte range is checked against the file before anything is read, and a
tensor is read by `seek` when it is asked for. Unlike `io.container`, which accepts only what diffedit itself writes,
this reader takes every valid layout. Nothing is unpickled.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffedit.errors import MalformedArtifactError, StorageError, UnsafeFormatError
from diffedit.io.strict import loads

MAX_HEADER = 1 << 24
MAX_TENSORS = 100_000

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

_METADATA = "__metadata__"
_PICKLES = (".bin", ".ckpt", ".h5", ".npz", ".pickle", ".pkl", ".pt", ".pth")
_MAGIC = ((b"PK", "a zip archive, as torch.save writes"), (b"\x80", "a pickle"), (b"\x89HDF", "an HDF5 file"))
_AGAIN = "download or save the file again"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file.

    Attributes:
        dtype: safetensors' name of it ("F32", "BF16", ...), perhaps one that is not in `DTYPES`.
        shape: as stored.
        start: first byte, counted from the start of the file.
        stop: one past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """An open safetensors file. Use it as a context manager, or call `close`.

    The file stays open, so that a file that is replaced by name meanwhile does not change what is read.

    Args:
        path: a regular file; symbolic links are followed (the Hub's cache consists of them).

    Raises:
        UnsafeFormatError: a pickle or archive, by name or by content.
        MalformedArtifactError: no safetensors file, cut short, or with a header of two meanings.
        StorageError: the file system refused, or it is no regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix.lower() in _PICKLES:
            raise UnsafeFormatError(
                "diffedit never opens pickle-based files",
                value=ascii(path.name),
                cause="loading one may run code",
                hint="get the .safetensors version",
            )
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # before opening: a named pipe would block
                raise OSError("it is no regular file")
            self._file = open(path, "rb", buffering=0)
        except (OSError, ValueError) as error:
            cause = getattr(error, "strerror", None) or str(error)
            raise StorageError("the weights cannot be read", value=ascii(path.name), cause=cause) from error
        try:
            self.metadata, self.entries = self._header(os.fstat(self._file.fileno()).st_size)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; reading fails from now on."""
        self._file.close()

    def raw(self, name: str, rows: tuple[int, int] | None = None) -> bytearray:
        """The stored bytes of a tensor, or of rows [start, stop) of its first dimension.

        Raises:
            MalformedArtifactError: the file became shorter since it was opened.
        """
        entry = self.entries[name]
        start, size = entry.start, entry.stop - entry.start
        if rows is not None:
            row = size // entry.shape[0]
            start, size = start + rows[0] * row, (rows[1] - rows[0]) * row
        return self._read(start, size, name)

    def tensor(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or rows of it, in memory of its own on the CPU.

        Raises:
            MalformedArtifactError: its dtype has no counterpart here, or the file became shorter.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise MalformedArtifactError(f"tensor {ascii(name)[:120]} has an unknown dtype", value=entry.dtype)
        shape = entry.shape if rows is None else (rows[1] - rows[0], *entry.shape[1:])
        return decode(self.raw(name, rows), entry.dtype, shape)

    def _read(self, start: int, size: int, what: str) -> bytearray:
        data = bytearray(size)
        view, filled = memoryview(data), 0
        try:
            self._file.seek(start)
            while filled < size:
                got = self._file.readinto(view[filled:])
                if not got:
                    raise self._malformed("is cut short", f"at {ascii(what)[:120]}")
                filled += got
        except OSError as error:
            raise StorageError("the weights cannot be read", value=self.path.name, cause=error.strerror) from error
        return data

    def _header(self, size: int) -> tuple[dict[str, str], dict[str, Entry]]:
        head = self._read(0, min(size, 8), "its header")
        length = int.from_bytes(head, "little")
        if size < 8 or length > MAX_HEADER:
            for magic, what in _MAGIC:
                if head.startswith(magic):
                    hint = "get the .safetensors version"
                    raise UnsafeFormatError(f"{self.path.name} is not safetensors but {what}", hint=hint)
            raise self._malformed(
                "is no safetensors file", f"{size} bytes" if size < 8 else f"header of {length} bytes"
            )
        if 8 + length > size:
            raise self._malformed("is cut short", f"header ends at byte {8 + length}, file at {size}")
        try:
            header = loads(self._read(8, length, "its header").decode("utf-8"), self.path.name)
        except UnicodeDecodeError as error:
            raise self._malformed("has a header that is no text", f"byte {8 + error.start}") from error
        if not isinstance(header, dict) or len(header) > MAX_TENSORS:
            raise self._malformed("has no header of tensors", type(header).__name__)
        metadata = header.pop(_METADATA, {})
        entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
        cursor = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != cursor:
                raise self._malformed(f"overlaps or leaves a gap before {ascii(name)[:120]}", entry.start - 8 - length)
            cursor = entry.stop
        if cursor != size:
            what = "is cut short" if size < cursor else "holds more than its tensors"
            raise self._malformed(what, f"{size} bytes, {cursor} announced")
        return metadata if isinstance(metadata, dict) else {}, entries

    def _entry(self, name: str, value: Any, offset: int) -> Entry:
        keys = {"dtype", "shape", "data_offsets"}
        if not isinstance(value, dict) or set(value) != keys or not isinstance(value["dtype"], str):
            raise self._malformed(f"describes {ascii(name)[:120]} wrongly", ascii(value)[:120])
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._malformed(f"gives {ascii(name)[:120]} an impossible place", ascii(value)[:120])
        if dtype in DTYPES and prod(shape) * DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
            raise self._malformed(f"gives {ascii(name)[:120]} a wrong size", ascii(value)[:120])
        return Entry(dtype, tuple(shape), offset + offsets[0], offset + offsets[1])

    def _malformed(self, what: str, value: object) -> MalformedArtifactError:
        return MalformedArtifactError(f"the file {self.path.name!a} {what}", value=value, hint=_AGAIN)


def decode(raw: bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Little-endian bytes as a tensor; takes the bytes over on machines that are little-endian themselves."""
    kind = DTYPES[dtype]
    if not raw:
        return torch.empty(shape, dtype=kind)
    words = np.frombuffer(raw, f"<i{kind.itemsize}").astype(f"i{kind.itemsize}", copy=False)
    return torch.from_numpy(words).view(kind).reshape(shape)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
