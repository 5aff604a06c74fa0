"""Reading a half-precision model in float32, without a float32 copy of it.

Keys are solved for in float64; taken from a forward pass in float16 they would carry its rounding, 2^-11 of each
activation and more with every layer. Here the weights are what the file says and everything computed from them is
float32: inside `widened` each linear layer, layer norm and embedding sees its operands as float32. A weight is widened
for the moment of its product (the largest of a text encoder: 3072 x 768, 9 MB) and of an embedding only the rows that
were looked up; the module itself is neither changed nor copied.

The result is that of the model converted to float32, since widening is exact. Float32 and float64 models run as they
are. Limits: layers that compute otherwise than by these three functions keep their own precision (torch's promotion
then widens what they are added to); an explicit cast inside the model, as adapters have it, stays a cast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_HALF = (torch.float16, torch.bfloat16)
_PRODUCTS = (F.linear, F.layer_norm)


class _Wide(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        given: Mapping[str, Any] = kwargs or {}
        if func in _PRODUCTS:
            return func(*map(_wide, args), **{name: _wide(value) for name, value in given.items()})
        out = func(*args, **given)
        return _wide(out) if func is F.embedding else out


@contextmanager
def widened(*modules: nn.Module) -> Iterator[None]:
    """Inside the block half-precision modules compute in float32; nothing happens if these have no such weights.

    Args:
        modules: that will run.
    """
    if any(parameter.dtype in _HALF for module in modules for parameter in module.parameters()):
        with _Wide():
            yield
    else:
        yield


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value
