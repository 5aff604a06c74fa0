"""The ridge solve for many pairs: from Gram matrices, without a singular value decomposition.

    D = R^T S K A^-1,    A = lam I + K^T S K + Q^T P Q  [d_in, d_in]

In three shapes, with M the N stacked weighted rows of which the first n are to change:

    n >= d_in        D = (R^T S K) A^-1, a matrix of full rank: up = D, down = I; the rows may come in blocks
    n < d_in <= N    up = R^T sqrt(S),  down = sqrt(S) K A^-1
    N < d_in         the same with the small Gram matrix: down = first n rows of (M M^T + lam I)^-1 M

One Cholesky factorisation each. Forming a Gram matrix squares the condition number, so the relative error is about
1e-16 times the condition number of A: this way is taken up to `CONDITION_GRAM`, where that is less than the rounding of
the stored float32 factors; beyond it the answer here is `None`, and for n >= d_in `tall_factors` takes over: a QR
factorisation of [M, R] in blocks of rows, which squares nothing and holds one block beside d_in + d_out rows.

Where the numbers are large the condition number is estimated, by power and inverse iteration on the Cholesky factor: to
a few per cent. Cost for N rows: 2 N d^2 multiply-adds and d^3 / 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Blocks = Iterable[tuple[Tensor, Tensor]]

GRAM_FROM = 128
CONDITION_GRAM = 3e8

_EXACT = 256
_STEPS = 40
_BLOCK = 4096
_STRIP = 192


@dataclass(frozen=True)
class Factors:
    """A solution in factors and what is known of it; see `linalg.solve.RidgeSolution`."""

    up: Tensor
    down: Tensor
    condition: float
    rank: int
    residual: float
    drift: float


def gram_factors(keys: Tensor, residuals: Tensor, others: Tensor, lam: float) -> Factors | None:
    """The solution, or `None` where Gram matrices would lose digits.

    Args:
        keys: [n, d_in], float64, weights folded in.
        residuals: [n, d_out], float64, weights folded in.
        others: [m, d_in], weighted rows that only enter A: preserve keys and a root of the second moment.
        lam: positive.
    """
    n, d = keys.shape
    if n + len(others) < d:
        return _wide(keys, residuals, others, lam)
    if n >= d:
        return block_factors(lambda: [(keys, residuals)], lambda: [others], lam)
    a = gram(keys) + gram(others)
    a.diagonal().add_(lam)
    factor, condition, rank = _factorise(a, lam, d)
    if factor is None:
        return None
    down = torch.cholesky_solve(keys.T, factor).T
    return _measured(keys, residuals, others, residuals.T.contiguous(), down, condition, rank)


def block_factors(wanted: Callable[[], Blocks], held: Callable[[], Iterable[Tensor]], lam: float) -> Factors | None:
    """The solution for n >= d_in from blocks of rows, of which one at a time is in float64; what stays is d x d.

    Args:
        wanted: keys [b, d_in] and residuals [b, d_out], weights folded in; at least one block, each time it is called.
        held: [b, d_in], weighted rows that only enter A, likewise.
        lam: positive.

    Returns:
        `None` where Gram matrices would lose digits.
    """
    own, crossed, size = normal_equations((keys.double(), residuals.double()) for keys, residuals in wanted())
    still = torch.zeros_like(own)
    for rows in held():
        still += gram(rows.double())
    a = own + still
    a.diagonal().add_(lam)
    factor, condition, rank = _factorise(a, lam, len(own))
    if factor is None:
        return None
    change = torch.cholesky_solve(crossed.T, factor).T.contiguous()
    left = size - 2 * float((change * crossed).sum()) + float(((change @ own) * change).sum())
    if left < 1e-9 * size:  # the difference has cancelled: look at the rows themselves
        missed = (torch.linalg.vector_norm(r.double() - k.double() @ change.T) for k, r in wanted())
        left = sum(float(part) ** 2 for part in missed)
    drift = max(float(((change @ still) * change).sum()), 0.0) ** 0.5
    scale = size**0.5 if size > 0 else 1.0
    return Factors(change, _identity(own), condition, rank, left**0.5 / scale, drift / scale)


def normal_equations(blocks: Blocks) -> tuple[Tensor, Tensor, float]:
    """K^T K [d_in, d_in], R^T K [d_out, d_in] and |R|^2 of rows that come in blocks.

    Args:
        blocks: at least one, keys [b, d_in] and residuals [b, d_out], float64; each may take the memory of the one
            before.
    """
    rest = iter(blocks)
    k, r = next(rest)
    own, crossed, size = gram(k), r.T @ k, float(torch.linalg.vector_norm(r)) ** 2
    for k, r in rest:
        own += gram(k)
        crossed.addmm_(r.T, k)
        size += float(torch.linalg.vector_norm(r)) ** 2
    return own, crossed, size


def tall_factors(keys: Tensor, residuals: Tensor, others: Tensor, lam: float, cut: float) -> Factors:
    """The solution for n >= d_in by QR of [M, R] in blocks: no condition number is squared.

    Args:
        keys: as in `gram_factors`.
        residuals: likewise.
        others: likewise.
        lam: at least 0.
        cut: singular values below `cut` of the largest are dropped.
    """
    d, e = keys.shape[1], residuals.shape[1]
    triangle = keys.new_zeros(0, d + e)
    for part in (*torch.split(torch.cat([keys, residuals], 1), _BLOCK), *torch.split(others, _BLOCK)):
        rows = torch.nn.functional.pad(part, (0, d + e - part.shape[1]))
        triangle = torch.linalg.qr(torch.cat([triangle, rows]), mode="r").R
    left, sigma, right = torch.linalg.svd(triangle[:d, :d])
    kept = sigma > cut * sigma[0]
    rank = int(kept.sum())
    gain = torch.where(kept, sigma / (sigma**2 + lam), torch.zeros_like(sigma))
    change = ((triangle[:d, d:].T @ left) * gain) @ right
    condition = (float(sigma[0]) ** 2 + lam) / (float(sigma[rank - 1]) ** 2 + lam)
    return _measured(keys, residuals, others, change, _identity(keys), condition, rank)


def gram(rows: Tensor) -> Tensor:
    """rows^T rows, [d, d]; below the diagonal it is copied, not computed, which saves nearly half of the work."""
    d = rows.shape[1]
    out = rows.new_empty(d, d)
    for start in range(0, d, _STRIP):
        strip = rows[:, start : start + _STRIP].T @ rows[:, start:]
        out[start : start + _STRIP, start:] = strip
        out[start:, start : start + _STRIP] = strip.T
    return out


def _identity(keys: Tensor) -> Tensor:
    return torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device)


def _wide(keys: Tensor, residuals: Tensor, others: Tensor, lam: float) -> Factors | None:
    rows = torch.cat([keys, others]) if len(others) else keys
    small = rows @ rows.T
    small.diagonal().add_(lam)
    factor, condition, rank = _factorise(small, lam, keys.shape[1])
    if factor is None:
        return None
    first = torch.eye(len(rows), len(keys), dtype=keys.dtype, device=keys.device)
    down = torch.cholesky_solve(first, factor).T @ rows
    return _measured(keys, residuals, others, residuals.T.contiguous(), down, condition, rank)


def _factorise(a: Tensor, lam: float, width: int) -> tuple[Tensor | None, float, int]:
    """Cholesky factor of `a` (`None` if it is too ill-conditioned), its condition number, rank of a - lam I."""
    factor, info = torch.linalg.cholesky_ex(a)
    if int(info):
        return None, float("inf"), 0
    n = len(a)
    noise = n * torch.finfo(a.dtype).eps
    if n <= _EXACT:
        energy = torch.linalg.eigvalsh(a)
    else:
        energy = torch.tensor(_extremes(a, factor))
        if float(energy[0]) - lam <= noise * float(energy[-1]):
            energy = torch.linalg.eigvalsh(a)
    largest = float(energy[-1])
    condition = largest / max(float(energy[0]), lam)
    lost = int((energy - lam <= noise * largest).sum()) if len(energy) == n else 0
    return (None if condition > CONDITION_GRAM else factor), condition, n - lost


def _extremes(a: Tensor, factor: Tensor) -> tuple[float, float]:
    """Least and largest eigenvalue, by Rayleigh quotients of power iterations."""
    start = torch.randn(len(a), 1, generator=torch.Generator().manual_seed(0), dtype=a.dtype).to(a.device)
    high = low = start
    for _ in range(_STEPS):
        high = torch.nn.functional.normalize(a @ high, dim=0)
        low = torch.nn.functional.normalize(torch.cholesky_solve(low, factor), dim=0)
    return float((low * (a @ low)).sum()), float((high * (a @ high)).sum())


def _measured(
    keys: Tensor, residuals: Tensor, others: Tensor, up: Tensor, down: Tensor, condition: float, rank: int
) -> Factors:
    """The factors with the residual and the drift that they leave, from the rows themselves."""
    wanted = float(torch.linalg.vector_norm(residuals))
    left = torch.linalg.vector_norm(residuals - (keys @ down.T) @ up.T)
    drift = torch.linalg.vector_norm((others @ down.T) @ up.T)
    scale = wanted if wanted > 0 else 1.0
    return Factors(up, down, condition, rank, float(left) / scale, float(drift) / scale)
