"""The one solve behind every closed-form edit, straight into low-rank factors.

We look for the change `D` of a weight `W` ([d_out, d_in]) that minimises

    sum_i s_i |(W + D) k_i - v_i|^2  +  sum_j p_j |D q_j|^2  +  mu tr(D C D^T)  +  lam |D|^2

over edit pairs (k_i, v_i), preserve keys q_j and a second moment C. With residuals R = V - K W^T the normal
equations give

    D = R^T S K A^-1,      A = lam I + mu C + K^T S K + Q^T P Q.

`A` is never formed. Stack the weighted keys M = [sqrt(S) K; sqrt(P) Q; sqrt(mu) C^1/2] and take the SVD
M = U diag(s) Z^T: then sqrt(S) K A^-1 is the first n rows of U diag(s / (s^2 + lam)) Z^T, and

    up = R^T sqrt(S)   [d_out, n],        down = (first n rows)   [n, d_in],        D = up @ down.

This squares no condition number: the tests hold it to eight digits against high-precision arithmetic where A is
conditioned 1e12; a float32 `inverse`, as the field's scripts use it, is meaningless from 1e8 on. With `lam = 0` it
is the minimum-norm solution, singular values below `RCOND` of the largest being dropped. Everything runs in float64,
whatever the caller's autocast or default dtype says.

From `GRAM_FROM` stacked rows on, the same answer comes from Gram matrices as long as A is conditioned well enough for
that, and from a QR factorisation in blocks where it is not (`linalg.gram`): the SVD costs seconds there. With at least
d_in pairs the change has full rank, and the factors are the matrix and the identity.

Source: Basu et al. 2023 (arXiv 2310.13730), eq. 8 and 9; the preserve term is UCE's (arXiv 2308.14761), the second
moment MEMIT's. Limits: all stacked rows are held in memory, in float64 (not so in `ridge_of_blocks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffedit.errors import IllConditionedError, NonFiniteError, RequestError
from diffedit.linalg.gram import GRAM_FROM, Blocks, Factors, block_factors, gram_factors, tall_factors

RCOND = 1e-12
CONDITION_LIMIT = 1e14


@dataclass(frozen=True)
class RidgeSolution:
    """Factors of the change and what the solve says about itself.

    Attributes:
        up: [d_out, n], float64; [d_out, d_in] for many pairs, see the module's text.
        down: [n, d_in], float64; the identity for many pairs.
        condition: condition number of `A` on the span of the keys (s_max^2 + lam) / (s_min^2 + lam).
        effective_rank: singular values of the stacked keys above `RCOND` (with lam: above rounding) of the largest.
        residual: |(W + D) K - V| / |R|, weighted: the share of the request that regularisation left undone, 0 to 1.
        preserve_drift: |D Q| / |R|, weighted: how far the preserve keys moved, in units of the request; 0 without any.
    """

    up: Tensor
    down: Tensor
    condition: float
    effective_rank: int
    residual: float
    preserve_drift: float


def ridge_factors(
    keys: Tensor,
    residuals: Tensor,
    *,
    lam: float,
    weights: Tensor | None = None,
    preserve: Tensor | None = None,
    preserve_weights: Tensor | None = None,
    moment_root: Tensor | None = None,
) -> RidgeSolution:
    """Solve for the change of one weight.

    Args:
        keys: [n, d_in], inputs whose outputs are to change.
        residuals: [n, d_out], wanted output minus present output (bias removed from both).
        lam: larger keeps the old weights and weakens the edit; 0 fits the pairs exactly where the keys allow it.
        weights: [n], importance of each pair; a weight of 0 removes the pair, 2 counts it twice. Default: ones.
        preserve: [m, d_in], inputs whose outputs are to stay.
        preserve_weights: [m]. Default: ones.
        moment_root: [r, d_in], any root of mu C, so that root^T root = mu C.

    Returns:
        The factors and the diagnostics.

    Raises:
        NonFiniteError: an input holds NaN or infinity.
        RequestError: shapes disagree, there are no keys, all weights are zero, or a weight or `lam` is negative.
        IllConditionedError: condition number above `CONDITION_LIMIT`.
    """
    keys, residuals = _matrix("keys", keys), _matrix("residuals", residuals)
    n, d_in = keys.shape
    if residuals.shape[0] != n or n == 0:
        raise RequestError(
            "keys and residuals do not pair up", value=f"{tuple(keys.shape)} and {tuple(residuals.shape)}"
        )
    if not lam >= 0 or lam == float("inf"):
        raise RequestError("lam must be a finite number >= 0", value=lam)
    root_weights = _root("weights", weights, n, keys)
    if root_weights is not None:
        keys, residuals = keys * root_weights, residuals * root_weights
    preserved = keys.new_zeros(0, d_in)
    if preserve is not None and preserve.shape[0]:
        preserved = _matrix("preserve", preserve)
        root_p = _root("preserve_weights", preserve_weights, preserved.shape[0], keys)
        preserved = preserved if root_p is None else preserved * root_p
    moment = keys.new_zeros(0, d_in) if moment_root is None else _matrix("moment_root", moment_root)
    if any(rows.shape[1] != d_in for rows in (preserved, moment)):
        raise RequestError(
            "keys, preserve keys and second moment have different widths",
            value=[tuple(rows.shape) for rows in (keys, preserved, moment)],
        )
    if not bool(keys.any()):
        raise RequestError("every key is zero", cause="nothing distinguishes the subject at this site")
    with torch.autocast(device_type=keys.device.type, enabled=False), torch.no_grad():
        found = _solve(keys, residuals, preserved, moment, lam)
    return _told(found)


def ridge_of_blocks(
    wanted: Callable[[], Blocks], held: Callable[[], Iterable[Tensor]], *, lam: float
) -> RidgeSolution | None:
    """`ridge_factors` for at least d_in keys that come in blocks: one at a time is turned into float64.

    Args:
        wanted: keys [b, d_in] and residuals [b, d_out], weights folded in; anew each time it is called.
        held: preserve keys [b, d_in], weights folded in, likewise; all on the CPU, as all pairs.
        lam: as for `ridge_factors`.

    Returns:
        `None` where that would lose digits, or the numbers are not fit to be solved: ask `ridge_factors`.
    """
    if lam <= 0:
        return None
    with torch.autocast(device_type="cpu", enabled=False), torch.no_grad():
        found = block_factors(wanted, held, lam)
    if found is None or not math.isfinite(found.residual) or not bool(found.up.any()):
        return None
    return _told(found)


def _told(found: Factors) -> RidgeSolution:
    return RidgeSolution(found.up, found.down, found.condition, found.rank, found.residual, found.drift)


def _solve(keys: Tensor, residuals: Tensor, preserved: Tensor, moment: Tensor, lam: float) -> Factors:
    n, d_in = keys.shape
    total = n + len(preserved) + len(moment)
    # With lam a weak direction is damped, not amplified, so only rounding noise may be dropped.
    cut = RCOND if lam == 0 else torch.finfo(torch.float64).eps * max(total, d_in)
    if total >= GRAM_FROM and not len(moment):
        found = gram_factors(keys, residuals, preserved, lam) if lam > 0 else None
        if found is None and n >= d_in:
            found = tall_factors(keys, residuals, preserved, lam, cut)
        if found is not None:
            _check_condition(found.condition)
            return found
    left, sigma, right = torch.linalg.svd(torch.cat([keys, preserved, moment]), full_matrices=False)
    largest = float(sigma[0])
    kept = sigma > cut * largest
    rank = int(kept.sum())
    condition = (largest**2 + lam) / (float(sigma[rank - 1]) ** 2 + lam)
    _check_condition(condition)
    gain = torch.where(kept, sigma / (sigma**2 + lam), torch.zeros_like(sigma))
    down = (left[:n] * gain) @ right
    up = residuals.T.contiguous()
    wanted = float(torch.linalg.vector_norm(up))
    left_over = torch.linalg.vector_norm(up.T - (keys @ down.T) @ up.T)
    drift = torch.linalg.vector_norm((preserved @ down.T) @ up.T)
    scale = wanted if wanted > 0 else 1.0
    return Factors(up, down, condition, rank, float(left_over) / scale, float(drift) / scale)


def _check_condition(condition: float) -> None:
    if condition > CONDITION_LIMIT:
        raise IllConditionedError(
            "the keys are almost linearly dependent",
            value=f"condition {condition:.1e}, limit {CONDITION_LIMIT:.0e}",
            hint="raise lam, or remove subjects that mean the same",
        )


def _matrix(name: str, value: Tensor) -> Tensor:
    if value.ndim != 2:
        raise RequestError(f"{name} must be a matrix", value=tuple(value.shape))
    value = value.detach().to(torch.float64)
    if not bool(torch.isfinite(value.sum())):  # a sum carries any NaN or infinity
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise NonFiniteError(f"{name} of the solve are not finite", value=f"{bad} of {value.numel()} numbers")
    return value


def _root(name: str, value: Tensor | None, n: int, like: Tensor) -> Tensor | None:
    """[n, 1] roots of the weights, `None` for ones."""
    if value is None:
        return None
    value = value.detach().to(device=like.device, dtype=torch.float64)
    if value.shape != (n,) or not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
        raise RequestError(f"{name} must be {n} finite numbers >= 0", value=tuple(value.shape))
    return value.sqrt()[:, None]
