"""A safetensors file with exactly one byte string per content.

The format: 8 bytes little-endian header length, a JSON header, the tensors' bytes. The official writer orders header
keys differently from run to run once there are two metadata keys; the official reader accepts files that two readers
may understand differently (a name twice, any name at all, NaN, unknown fields) and notices 22% of flipped bits. `pack`
writes one canonical form that every safetensors reader loads; `unpack` accepts that form and nothing else:

    header = canonical JSON (sorted keys, no white space), padded with spaces to a multiple of 8
    data   = tensors in the order (wider elements first, then by name), back to back, little-endian

so a changed header bit is a `MalformedArtifactError`. Data bits are covered by the hashes that `io.files` keeps. Files
are parsed from bytes in memory, never mapped: a mapped file that another process truncates kills the reader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffedit.errors import MalformedArtifactError, UnsafeFormatError, UnsupportedTensorError
from diffedit.io.manifest import canonical_json
from diffedit.io.strict import loads

MAX_FILE = 1 << 30
MAX_HEADER = 1 << 24  # some 20,000 requests in one edit
MAX_TENSORS = 4096
MAX_RANK = 4

DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_METADATA = "__metadata__"
_NAME = re.compile(r"[A-Za-z0-9_.]{1,256}")
# What pickles and archives start with: the checkpoints that may run code, and containers that are no safetensors.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x80", "a pickle"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"\x1f\x8b", "a gzip file"),
)


def pack(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    """Serialise tensors and string metadata; equal content gives equal bytes, on every machine.

    Args:
        metadata: text that goes into the header's `__metadata__`.
        tensors: name to tensor, any device, contiguous or not; float16, bfloat16, float32 or float64.

    Raises:
        UnsupportedTensorError: another dtype, or a tensor without plain data (meta, sparse, quantised).
        MalformedArtifactError: a name, shape or size that `unpack` would refuse.
    """
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    chunks: list[bytes] = []
    cursor = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        data = tensor_bytes(tensor, name)
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [cursor, cursor + len(data)],
        }
        chunks.append(data)
        cursor += len(data)
    _layout(entries, cursor, "the file being written")
    header = _frame(entries, "the file being written")
    if len(header) > MAX_HEADER or 8 + len(header) + cursor > MAX_FILE:
        raise MalformedArtifactError(
            "the file would be larger than diffedit reads back",
            value=f"header {len(header)} bytes, data {cursor} bytes",
            hint="save fewer edits in one file",
        )
    return b"".join([len(header).to_bytes(8, "little"), header, *chunks])


def unpack(data: bytes, where: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Parse what `pack` wrote, and only that.

    Args:
        data: the whole file.
        where: its name, for messages.

    Returns:
        Metadata and tensors (on the CPU, in memory of their own), in name order.

    Raises:
        UnsafeFormatError: a pickle, zip or other container.
        MalformedArtifactError: anything else that is not canonical to the byte.
    """
    if len(data) > MAX_FILE:
        raise MalformedArtifactError(f"{where} is too large for an edit", value=f"{len(data)} bytes, limit {MAX_FILE}")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > MAX_HEADER:
        _refuse_other_formats(data, where)
        raise MalformedArtifactError(
            f"{where} is no safetensors file",
            value=f"{len(data)} bytes" if len(data) < 8 else f"header of {length} bytes, limit {MAX_HEADER}",
            hint="download or save the file again",
        )
    if 8 + length > len(data):
        raise MalformedArtifactError(
            f"{where} is cut short",
            value=f"header ends at byte {8 + length}, file at {len(data)}",
            hint="download or save the file again",
        )
    raw = data[8 : 8 + length]
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedArtifactError(f"the header of {where} is not UTF-8", value=f"byte {8 + error.start}") from error
    header = loads(text, where)
    if not isinstance(header, dict) or _frame(header, where) != raw:
        raise MalformedArtifactError(
            f"the header of {where} is not in canonical form",
            cause="another program wrote the file, or a byte of it changed",
            hint="use the edit.safetensors that diffedit saved",
        )
    metadata = header.get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedArtifactError(f"the metadata of {where} is not text")
    tensors = {}
    for name, (dtype, shape, start, stop) in _layout(header, len(data) - 8 - length, where).items():
        integers = np.dtype(f"i{dtype.itemsize}")
        raw_numbers = np.frombuffer(
            data, integers.newbyteorder("<"), (stop - start) // dtype.itemsize, 8 + length + start
        )
        tensors[name] = torch.from_numpy(raw_numbers.astype(integers)).view(dtype).reshape(shape)
    return metadata, dict(sorted(tensors.items()))


def tensor_bytes(tensor: Tensor, name: str = "the tensor") -> bytes:
    """A copy of `tensor_numbers`."""
    return tensor_numbers(tensor, name).tobytes()


def tensor_numbers(tensor: Tensor, name: str = "the tensor") -> npt.NDArray[np.signedinteger[Any]]:
    """The numbers of a tensor in row-major order, little-endian, without padding; their bits as integers.

    Raises:
        UnsupportedTensorError: a dtype other than the four floats, or no plain data (meta, sparse).
    """
    if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or tensor.is_meta:
        raise UnsupportedTensorError(
            f"{name} cannot be stored",
            value=f"{tensor.dtype}, {tensor.layout}, on {tensor.device}",
            hint="convert it to a dense float16, bfloat16, float32 or float64 tensor",
        )
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(integers)
    found: npt.NDArray[np.signedinteger[Any]] = flat.numpy().astype(f"<i{tensor.dtype.itemsize}", copy=False)
    return found


def _frame(header: Mapping[str, Any], where: str) -> bytes:
    """The header's only valid bytes."""
    try:
        text = canonical_json(header)
    except (ValueError, TypeError) as error:  # a lone surrogate, NaN, an object that is no JSON
        raise MalformedArtifactError(
            f"the header of {where} cannot be written as JSON", value=str(error)[:200]
        ) from error
    return text + b" " * (-len(text) % 8)


def _layout(header: Mapping[str, Any], size: int, where: str) -> dict[str, tuple[torch.dtype, list[int], int, int]]:
    """Check every tensor entry against the one allowed layout: name -> (dtype, shape, start, stop) in the data."""

    def refuse(name: str, what: str, value: object) -> MalformedArtifactError:
        return MalformedArtifactError(f"tensor {ascii(name)[:80]} of {where} {what}", value=ascii(value)[:120])

    names = [name for name in header if name != _METADATA]
    if len(names) > MAX_TENSORS:
        raise MalformedArtifactError(f"{where} holds too many tensors", value=f"{len(names)}, limit {MAX_TENSORS}")
    entries: dict[str, tuple[torch.dtype, list[int], int, int]] = {}
    for name in names:
        entry = header[name]
        if not _NAME.fullmatch(name):
            raise refuse(name, "has a name that no layer has", name)
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise refuse(name, "needs dtype, shape and data_offsets", entry)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise refuse(name, "has a dtype that edits do not use", dtype)
        if not _integers(shape) or len(shape) > MAX_RANK or any(size < 1 for size in shape):
            raise refuse(name, "has an impossible shape", shape)
        if not _integers(offsets) or len(offsets) != 2:
            raise refuse(name, "has impossible offsets", offsets)
        entries[name] = (DTYPES[dtype], shape, offsets[0], offsets[1])
    cursor = 0
    for name, (kind, shape, start, stop) in sorted(entries.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        wanted = kind.itemsize
        for extent in shape:
            wanted *= extent
        if start != cursor or stop - start != wanted:
            raise refuse(name, f"should lie at [{cursor}, {cursor + wanted}]", [start, stop])
        cursor = stop
    if cursor != size:
        raise MalformedArtifactError(
            f"{where} has the wrong length",
            value=f"{size} bytes of data, {cursor} announced",
            hint="download or save the file again",
        )
    return entries


def _integers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _refuse_other_formats(data: bytes, where: str) -> None:
    for magic, what in _MAGIC:
        if data.startswith(magic):
            raise UnsafeFormatError(
                f"{where} is not safetensors but {what}",
                cause="opening a pickle may run code, so diffedit never does",
                hint="use the edit.safetensors that diffedit saved",
            )
