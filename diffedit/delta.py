"""The algebra of weight changes: `LowRank` (one matrix, kept as two thin factors) and `Delta` (one per edit site).

A change `D = up @ down` is a LoRA by construction (`lora_B = up`, `lora_A = down`, alpha = rank): exporting it loses
nothing. The dense [d_out, d_in] matrix exists only when asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from diffedit.errors import NonFiniteError, RequestError
from diffedit.site import EditSite


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
        """Frobenius norm, from thin QR factors: no dense matrix, and no digits lost where factors nearly cancel."""
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

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> LowRank:
        """Both factors cast and moved."""
        return LowRank(self.up.to(device=device, dtype=dtype), self.down.to(device=device, dtype=dtype))

    def check_finite(self, name: str) -> None:
        """Raise `NonFiniteError` that names the site if a factor holds NaN or infinity."""
        bad = int((~torch.isfinite(self.up)).sum()) + int((~torch.isfinite(self.down)).sum())
        if bad:
            raise NonFiniteError(f"the change of {name} is not finite", value=f"{bad} numbers")


@dataclass(frozen=True)
class Diagnostics:
    """What the solve of one site reported; see `linalg.solve.RidgeSolution` for the meaning of each number.

    `relative_norm` is |D| / |W|, `pairs` and `preserved` the numbers of keys that went in.
    """

    condition: float
    effective_rank: int
    residual: float
    preserve_drift: float
    relative_norm: float
    pairs: int
    preserved: int


@dataclass(frozen=True, eq=False)
class Delta:
    """Changes of several weights.

    Attributes:
        factors: one `LowRank` per edit site, in the sites' order.
        diagnostics: what the solve said, per site; empty for deltas that no solve produced (sums, loaded files).
    """

    factors: Mapping[EditSite, LowRank]
    diagnostics: Mapping[EditSite, Diagnostics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site, factor in self.factors.items():
            if factor.shape != (site.d_out, site.d_in):
                raise RequestError(
                    f"the change does not fit {site.name}", value=f"{factor.shape} for {(site.d_out, site.d_in)}"
                )
        ordered = {site: self.factors[site] for site in sorted(self.factors)}
        object.__setattr__(self, "factors", MappingProxyType(ordered))
        object.__setattr__(self, "diagnostics", MappingProxyType(dict(self.diagnostics)))

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
        """`LowRank.compress` at every site, diagnostics kept."""
        return Delta({site: change.compress(tol) for site, change in self}, self.diagnostics)

    def to(self, dtype: torch.dtype) -> Delta:
        """Every factor cast to `dtype`, diagnostics kept."""
        return Delta({site: change.to(dtype) for site, change in self}, self.diagnostics)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors as they are held."""
        return sum(t.numel() * t.element_size() for _, change in self for t in (change.up, change.down))
