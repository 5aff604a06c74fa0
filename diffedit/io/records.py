"""What a manifest says about tensors: dtype, shape and SHA-256 of the numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from diffedit.io.container import DTYPE_NAMES, tensor_numbers
from diffedit.io.manifest import TensorRecord

_LARGE = 1 << 22  # bytes from which a thread for each tensor pays
_TOGETHER = 64  # parts; to hash each by itself would take longer than to copy them


def tensor_sha256(*parts: Tensor) -> str:
    """Hex SHA-256 of the numbers of a tensor: row-major, little-endian, without shape or dtype.

    Args:
        parts: the tensor, or several of one width that are its rows in order; put together some at a time.

    Raises:
        UnsupportedTensorError: not dense float16, bfloat16, float32 or float64 tensors.
    """
    digest = hashlib.sha256()
    for start in range(0, len(parts), _TOGETHER):
        some = parts[start : start + _TOGETHER]
        digest.update(tensor_numbers(torch.cat(some) if len(some) > 1 else some[0]).data)
    return digest.hexdigest()


def tensor_records(tensors: Mapping[str, Tensor | Sequence[Tensor]]) -> dict[str, TensorRecord]:
    """What the manifest says about each tensor, by name; a sequence is a tensor's rows in order."""
    parts = {name: [rows] if isinstance(rows, Tensor) else rows for name, rows in sorted(tensors.items())}
    if sum(part.nbytes for rows in parts.values() for part in rows) < _LARGE:
        digests = [tensor_sha256(*rows) for rows in parts.values()]
    else:  # hashlib lets go of the interpreter
        with ThreadPoolExecutor(len(parts), "diffedit-sha256") as pool:
            digests = list(pool.map(lambda rows: tensor_sha256(*rows), parts.values()))
    return {
        name: TensorRecord(dtype=DTYPE_NAMES[rows[0].dtype], shape=_shape(rows), sha256=digest)
        for (name, rows), digest in zip(parts.items(), digests, strict=True)
    }


def _shape(rows: Sequence[Tensor]) -> tuple[int, ...]:
    return sum(map(len, rows)), *rows[0].shape[1:]
