"""What a manifest says about tensors: dtype, shape and SHA-256 of the numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffedit.io.container import DTYPE_NAMES, tensor_numbers
from diffedit.io.manifest import TensorRecord

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
    found = {}
    for name, tensor in sorted(tensors.items()):
        parts = [tensor] if isinstance(tensor, Tensor) else tensor
        shape = sum(map(len, parts)), *parts[0].shape[1:]
        found[name] = TensorRecord(dtype=DTYPE_NAMES[parts[0].dtype], shape=shape, sha256=tensor_sha256(*parts))
    return found
