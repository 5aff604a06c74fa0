"""The algebra of weight changes: `LowRank` (one matrix, kept as two thin factors) and `Delta` (one per edit site).

A change `D = up @ down` is a LoRA by construction (`lora_B = up`, `lora_A = down`, alpha = rank): exporting it loses
nothing. The dense [d_out, d_in] matrix exists only when asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from diffedit.errors import NonFiniteError, RequestError
from diffedit.linalg.gram import GRAM_FROM
from diffedit.pairs import Pairs
from diffedit.site import EditSite

FLOAT32_TOL = 1e-7  # what a float32 factor does not hold anyway


@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix `up @ down` of at most rank r.

    Attributes:
        up: [d_out, r].
        down: [r, d_in], same dtype and device as `up`.
    """

    up: Tensor
    down: Tensor

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            shapes = f"{tuple(self.up.shape)} and {tuple(self.down.shape)}"
            raise RequestError("factors do not multiply", value=shapes, hint="up is [d_out, r], down is [r, d_in]")

    @classmethod
    def from_dense(cls, matrix: Tensor, *, rank: int | None = None, energy: float | None = None) -> Truncation:
        """The best approximation of a dense change by one of low rank: truncated SVD in float64, factors balanced.

        Args:
            matrix: [d_out, d_in], for example what a fine-tuning made of a weight minus the weight.
            rank: keep this many singular values; beyond the number there are, all are kept.
            energy: or keep the fewest that hold this share of the sum of their squares, in (0, 1].

        Returns:
            The factors (float64), the relative error and the share of energy kept.

        Raises:
            RequestError: no matrix, or not exactly one of `rank` and `energy`, or one out of range.
            NonFiniteError: NaN or infinity in the matrix.
        """
        if matrix.ndim != 2 or 0 in matrix.shape:
            raise RequestError("a change of a weight is a matrix", value=tuple(matrix.shape))
        if (rank is None) == (energy is None):
            raise RequestError("give either a rank or an energy", value=f"rank={rank}, energy={energy}")
        if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
            raise RequestError("rank is at least 1, energy in (0, 1]", value=f"rank={rank}, energy={energy}")
        if not bool(torch.isfinite(matrix).all()):
            raise NonFiniteError("the change is not finite", value=f"{int((~torch.isfinite(matrix)).sum())} numbers")
        left, sigma, right = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
        tails = torch.cat([sigma.square().flip(0).cumsum(0).flip(0), sigma.new_zeros(1)])  # tails[r]: lost at rank r
        total = float(tails[0])
        keep = rank if energy is None else int((tails > (1 - energy) * tails[0]).sum())
        keep = min(max(keep or 1, 1), sigma.numel())
        root = sigma[:keep].sqrt()
        lost = float(tails[keep]) / total if total else 0.0
        return Truncation(cls(left[:, :keep] * root, root[:, None] * right[:keep]), lost**0.5, 1.0 - lost)

    @property
    def shape(self) -> tuple[int, int]:
        """[d_out, d_in] of the dense matrix."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """Number of columns of `up`: an upper bound of the true rank."""
        return self.up.shape[1]

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The [d_out, d_in] matrix, multiplied in float64 and then cast to `dtype`."""
        return (self.up.double() @ self.down.double()).to(dtype)

    def norm(self) -> float:
        """Frobenius norm, from thin QR factors: no dense matrix, and no digits lost where factors nearly cancel.

        Of a change of nearly full rank, where the dense matrix is no larger than the factors, it is taken directly.
        Computed once: factors are not to be written to.
        """
        return self._norm

    @cached_property
    def _norm(self) -> float:
        if self.rank >= 256 and 2 * self.rank > min(self.shape):
            return float(torch.linalg.vector_norm(self.dense()))
        r_up = torch.linalg.qr(self.up.double()).R
        r_down = torch.linalg.qr(self.down.double().T).R
        return float(torch.linalg.vector_norm(r_up @ r_down.T))

    def scale(self, factor: float) -> LowRank:
        """`factor` times the matrix."""
        return LowRank(self.up * factor, self.down)

    def __add__(self, other: LowRank) -> LowRank:
        """Exact sum; ranks add up (see `compress`)."""
        if self.shape != other.shape:
            raise RequestError("changes of different shapes cannot be added", value=f"{self.shape} and {other.shape}")
        return LowRank(torch.cat([self.up, other.up], 1), torch.cat([self.down, other.down], 0))

    def compress(self, tol: float = 1e-12) -> LowRank:
        """The same matrix with the fewest factors, balanced: both factors carry sqrt of each singular value.

        Thin QR of each factor, SVD of the r x r core: exact to float64 but for singular values below `tol` of the
        largest, which are dropped. Balancing keeps half-precision copies accurate.
        """
        up, down = self.up.double(), self.down.double()
        q_up, r_up = torch.linalg.qr(up)
        q_down, r_down = torch.linalg.qr(down.T)
        left, sigma, right = torch.linalg.svd(r_up @ r_down.T)
        keep = max(1, int((sigma > tol * sigma[0]).sum())) if sigma.numel() else 0
        root = sigma[:keep].sqrt()
        return LowRank((q_up @ left[:, :keep]) * root, (root[:, None] * right[:keep]) @ q_down.T)

    def orthogonal(self) -> LowRank:
        """The same matrix with as many factors, the rows of `down` orthonormal, in float64.

        Cheaper than `compress` where nothing would be dropped: no factors cancel each other either.
        """
        q, r = torch.linalg.qr(self.down.double().T)
        return LowRank(self.up.double() @ r.T, q.T)

    def thin(self) -> LowRank:
        """The same matrix in as few float32 factors as it takes; without a decomposition where they are many."""
        change = self
        if change.rank < GRAM_FROM:
            change = change.compress(FLOAT32_TOL)
        elif change.rank < min(change.shape):
            change = change.orthogonal()
        if change.rank > min(change.shape):
            dense, wide = change.dense(), change.shape[0] < change.shape[1]
            one = torch.eye(min(change.shape), dtype=dense.dtype, device=dense.device)
            change = LowRank(one, dense) if wide else LowRank(dense, one)
        return change.to(torch.float32)

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> LowRank:
        """Both factors cast and moved."""
        return LowRank(self.up.to(device=device, dtype=dtype), self.down.to(device=device, dtype=dtype))

    def check_finite(self, name: str) -> None:
        """Raise `NonFiniteError` that names the site if a factor holds NaN or infinity."""
        if math.isfinite(float(self.up.sum()) + float(self.down.sum())):  # a sum carries any NaN or infinity
            return
        bad = int((~torch.isfinite(self.up)).sum()) + int((~torch.isfinite(self.down)).sum())
        if bad:
            raise NonFiniteError(f"the change of {name} is not finite", value=f"{bad} numbers")


@dataclass(frozen=True, eq=False)
class Truncation:
    """What `LowRank.from_dense` kept of a dense change D.

    Attributes:
        low_rank: the factors of the approximation A.
        error: |D - A| / |D|, Frobenius norm: the root of the dropped share of the squared singular values.
        energy: the kept share, 1 - error ** 2.
    """

    low_rank: LowRank
    error: float
    energy: float


@dataclass(frozen=True)
class Diagnostics:
    """What the solve of one site reported; see `linalg.solve.RidgeSolution` for the meaning of each number.

    `relative_norm` is |D| / |W|, `pairs` and `preserved` the numbers of keys that went in, `factor` what the
    regularisation was multiplied by (`linalg.curve`).
    """

    condition: float
    effective_rank: int
    residual: float
    preserve_drift: float
    relative_norm: float
    pairs: int
    preserved: int
    factor: float = 1.0


@dataclass(frozen=True)
class TrainingDiagnostics:
    """What the training of one site reported. The losses are means over the same fixed draws, for all sites together.

    Attributes:
        steps: training steps done.
        loss_before: of the original weights.
        loss_trained: of the trained weights, before they were made low rank.
        loss_after: of the weights that the edit makes.
        truncation_error: |D - up @ down| / |D|, D the trained change.
        relative_norm: |D| / |W|.
    """

    steps: int
    loss_before: float
    loss_trained: float
    loss_after: float
    truncation_error: float
    relative_norm: float


@dataclass(frozen=True, eq=False)
class Delta:
    """Changes of several weights.

    Attributes:
        factors: one `LowRank` per edit site, in the sites' order.
        diagnostics: what the solve said, per site; empty for deltas that no solve produced (sums, loaded files).
        pairs: what the solve started from, per site; empty if the updater keeps none. With them edits compose exactly.
    """

    factors: Mapping[EditSite, LowRank]
    diagnostics: Mapping[EditSite, Diagnostics | TrainingDiagnostics] = field(default_factory=dict)
    pairs: Mapping[EditSite, Pairs] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site, factor in self.factors.items():
            if factor.shape != (site.d_out, site.d_in):
                raise RequestError(
                    f"the change does not fit {site.name}", value=f"{factor.shape} for {(site.d_out, site.d_in)}"
                )
        ordered = {site: self.factors[site] for site in sorted(self.factors)}
        object.__setattr__(self, "factors", MappingProxyType(ordered))
        object.__setattr__(self, "diagnostics", MappingProxyType(dict(self.diagnostics)))
        object.__setattr__(self, "pairs", MappingProxyType(dict(self.pairs)))

    @property
    def sites(self) -> tuple[EditSite, ...]:
        """The edited sites, sorted."""
        return tuple(self.factors)

    def __iter__(self) -> Iterator[tuple[EditSite, LowRank]]:
        return iter(self.factors.items())

    def __add__(self, other: Delta) -> Delta:
        """Sum site by site; a site of one side only is taken as it is."""
        factors = dict(self.factors)
        for site, factor in other:
            factors[site] = factors[site] + factor if site in factors else factor
        return Delta(factors)

    def __mul__(self, factor: float) -> Delta:
        """Every change scaled by `factor`; 0.5 is half the edit, -1 its opposite."""
        return Delta({site: change.scale(factor) for site, change in self})

    __rmul__ = __mul__

    def compress(self, tol: float = 1e-12) -> Delta:
        """`LowRank.compress` at every site, diagnostics and pairs kept."""
        return Delta({site: change.compress(tol) for site, change in self}, self.diagnostics, self.pairs)

    def to(self, dtype: torch.dtype) -> Delta:
        """Every factor cast to `dtype`, diagnostics and pairs kept."""
        return Delta({site: change.to(dtype) for site, change in self}, self.diagnostics, self.pairs)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors as they are held."""
        return sum(t.numel() * t.element_size() for _, change in self for t in (change.up, change.down))
