"""Which of many subspaces could share a direction, without comparing each with each in full width.

Subspace a is spanned by the rows of block a ([r_a, d]). Two share a direction if the largest cosine between them is 1.
Three facts make the search cheap, and none of them can miss a shared direction:

    1. If all rows together are linearly independent, nothing is shared: one Cholesky factorisation says so.
    2. Sharing survives any invertible change of coordinates. Whitening (x -> x L^-T, L L^T the Gram matrix of all rows)
       takes out what all keys have in common; then unrelated blocks are nearly orthogonal.
    3. Sharing survives any projection. On m dimensions the comparison costs m instead of d; unrelated rows then have
       cosines of about 1 / sqrt(m), while of blocks that share a direction two rows reach 1 / r.

The candidates that remain are for the caller to examine. Cost: N^2 m for N rows, in float32, in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INDEPENDENT = 1e-8  # least eigenvalue of the Gram matrix; directions with 1 - cos <= 1e-9 give at most 1e-9
_RANK = 1e-12  # of the largest energy: singular values of 1e-6
_RIDGE = 1e-5  # hides differences of rows up to 1 - cos = 1e-9, which whitening would blow up to directions
_CLOSE = 0.999  # squared cosine in float32
_ROWS = 1024
_PAIRS = 1 << 14


def sharing(rows: Tensor, counts: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of blocks that may share a direction, each pair once, a < b; every pair that does is among them.

    Args:
        rows: [N, d], the blocks' rows one after the other.
        counts: rows of each block.
    """
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    basis, owner = _orthonormal(rows.double().cpu(), owner)
    n, d = basis.shape
    if n <= d:
        shifted = basis @ basis.T - INDEPENDENT * torch.eye(n, dtype=torch.float64)
        if int(torch.linalg.cholesky_ex(shifted).info) == 0:
            return []
    gram = basis.T @ basis
    gram.diagonal().add_(_RIDGE * max(1.0, n / d))
    factor = torch.linalg.cholesky(gram)
    white, owner = _orthonormal(torch.linalg.solve_triangular(factor, basis.T, upper=False).T, owner)
    largest = int(owner.bincount().max())
    m = 32 * largest**2
    if m < d:
        random = torch.randn(d, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        white, owner = _orthonormal(white @ random, owner)
    return _near(white.float(), owner)


def _near(rows: Tensor, owner: Tensor) -> list[tuple[int, int]]:
    """Pairs of blocks whose largest cosine is within rounding of 1."""
    counts = owner.bincount()
    blocks, largest = len(counts), int(counts.max())
    starts = counts.cumsum(0) - counts
    table = rows.new_zeros(blocks, largest, rows.shape[1])
    table[owner, torch.arange(len(rows)) - starts[owner]] = rows
    found: list[tuple[int, int]] = []
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS] @ rows[start:].T
        first, second = (part.abs_() >= 0.9 / largest).nonzero().T
        codes = torch.unique(owner[start:][first] * blocks + owner[start:][second])
        pairs = torch.stack([codes // blocks, codes % blocks], 1)
        for some in torch.split(pairs[pairs[:, 0] < pairs[:, 1]], _PAIRS):
            cosines = table[some[:, 0]] @ table[some[:, 1]].mT
            close = cosines.square().sum((1, 2)) >= _CLOSE
            some, cosines = some[close], cosines[close]
            energy = torch.linalg.eigvalsh(cosines @ cosines.mT)[:, -1]
            found += map(tuple, some[energy >= _CLOSE].tolist())
    return sorted(set(found))


def _orthonormal(rows: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the blocks, in order, and the owner of each row; blocks of one size go together."""
    counts = owner.bincount()
    starts = counts.cumsum(0) - counts
    out, owners = [], []
    for size in torch.unique(counts).tolist():
        if size == 0:
            continue
        blocks = (counts == size).nonzero()[:, 0]
        part = rows[starts[blocks][:, None] + torch.arange(size)]
        part = torch.nn.functional.normalize(part, dim=-1)
        energy, left = torch.linalg.eigh(part @ part.mT)
        kept = energy > _RANK * energy[:, -1:]
        out.append((left.mT @ part / energy.clamp_min(1e-300).sqrt()[..., None])[kept])
        owners.append(blocks.repeat_interleave(kept.sum(1)))
    order = torch.sort(torch.cat(owners), stable=True)
    return torch.cat(out)[order.indices], order.values
