"""The fewest rows that stand for a set of pairs, for one set or for many at once.

A ridge solve reads pairs (k_i, r_i, s_i) only through K^T S K and K^T S R. With U the left singular vectors of
M = [sqrt(S) K, rho sqrt(S) R], rho = |sqrt(S) K| / |sqrt(S) R| (0 without residuals), the rows

    K' = U^T sqrt(S) K,    R' = U^T sqrt(S) R,    all weights 1,

give the same two products: exactly if U spans the columns of M, and off by at most `tol`^2 of M's energy per row where
singular values below `tol` of the largest are left out. U is taken from the eigenvectors of the small Gram matrix
M M^T [n, n]: any orthogonal U gives the same products, so the eigenvalues' accuracy only decides what is dropped.

Many sets of equal size go through one batched call. Each set's arithmetic is its own: a set gives the same bits alone
and in a batch (tests/tiny/test_speed_paths.py).
"""

from __future__ import annotations

import torch
from torch import Tensor


def reduce_rows(keys: Tensor, residuals: Tensor, weights: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """The fewest rows that stand for these pairs; see the module's text.

    Args:
        keys: [n, d_in], float64.
        residuals: [n, d_out], float64; no columns for preserve keys.
        weights: [n].
        tol: singular values below `tol` of the largest are left out; 0 keeps the rows as they are.

    Returns:
        keys [r, d_in] and residuals [r, d_out], weights folded in.
    """
    if tol == 0.0 or keys.shape[0] <= keys.shape[1] + residuals.shape[1]:
        rows = reduce_batch(keys[None], residuals[None], weights[None], tol)
        return rows[0], rows[1]
    root = weights.sqrt()[:, None]
    keys, residuals = keys * root, residuals * root
    size = torch.linalg.vector_norm(residuals)
    rho = torch.linalg.vector_norm(keys) / size if bool(size > 0) else size
    stacked = torch.cat([keys, rho * residuals], 1)  # the same left vectors, from the smaller of the two Grams
    energy, right = torch.linalg.eigh(stacked.T @ stacked)
    kept = energy > (tol**2) * energy[-1]
    left = (stacked @ (right[:, kept] / energy[kept].sqrt())).flip(1).T
    return left @ keys, left @ residuals


def reduce_batch(
    keys: Tensor, residuals: Tensor, weights: Tensor, tol: float
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """`reduce_rows` for b sets of n pairs each, n at most d_in + d_out.

    Args:
        keys: [b, n, d_in], float64.
        residuals: [b, n, d_out], float64.
        weights: [b, n].
        tol: see `reduce_rows`.

    Returns:
        The rows of all sets one after the other, keys [sum of r, d_in] and residuals [sum of r, d_out], and each r.
    """
    if not bool((weights == 1.0).all()):  # a factor of 1 changes no bit
        root = weights.sqrt()[..., None]
        keys, residuals = keys * root, residuals * root
    b, n = keys.shape[:2]
    if tol == 0.0:
        return keys.flatten(0, 1), residuals.flatten(0, 1), (n,) * b
    own, wanted = keys @ keys.mT, residuals @ residuals.mT
    size, largest = (gram.diagonal(dim1=1, dim2=2).sum(1) for gram in (wanted, own))
    balance = torch.where(size > 0, largest / size, torch.zeros_like(size))  # rho squared
    energy, left = torch.linalg.eigh(own + balance[:, None, None] * wanted)
    energy, rotate = energy.flip(-1), left.flip(-1).mT  # strongest first
    kept = energy > (tol**2) * energy[:, :1]
    keys, residuals, ranks = rotate @ keys, rotate @ residuals, tuple(kept.sum(1).tolist())
    if min(ranks) == n:
        return keys.flatten(0, 1), residuals.flatten(0, 1), ranks
    return keys[kept], residuals[kept], ranks
