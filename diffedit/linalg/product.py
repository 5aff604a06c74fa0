"""A product whose every row is the same bits, whatever rows stand beside it.

    out = X W^T        X  [n, d_in],   W  [d_out, d_in]

Matrix libraries change their order of summation with the shape of a product, and some with the number of threads. So X
goes in parts of one shape, 32 rows, or of 16 where one such part is enough; zeros fill up. It is computed as W X^T,
which takes two thirds of the time of X W^T for so few rows, because W is read once and as it lies in memory; for
thousands of rows it takes a fifth more than one large product.

Measured: 16 and 32 rows give the same bits with one thread and with two on the processors tried, parts of 64 do not
(tests/unit/test_product.py checks the processor at hand).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_FEW, _PART = 16, 32


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """X W^T, each row by itself; see the module's text.

    Args:
        rows: X, [n, d_in].
        weight: W, [d_out, d_in], of the same dtype and on the same device.

    Returns:
        [n, d_out], contiguous.
    """
    if len(rows) <= _FEW:
        return _together(rows, weight, _FEW).contiguous()
    out = rows.new_empty(len(rows), len(weight))
    for part, place in zip(torch.split(rows, _PART), torch.split(out, _PART), strict=True):
        place.copy_(_together(part, weight, _PART))
    return out


def _together(rows: Tensor, weight: Tensor, size: int) -> Tensor:
    """The product of at most `size` rows, computed as if of `size`."""
    n = len(rows)
    padded = rows if n == size else F.pad(rows, (0, 0, 0, size - n))
    return torch.mm(weight, padded.T).T[:n]
