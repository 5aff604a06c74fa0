"""The only code that writes model weights.

    W = cast(W0 + sum of the active edits' changes)

For every touched weight the ledger keeps the original bytes on the CPU. A write is tried on a copy first and
refused as a whole if anything is wrong; reverting recomputes from the original and never subtracts, so it is exact
to the bit in every dtype. The sum runs in float64 in the order of the edits' ids: the same set of edits gives the
same bits in whatever order it was applied.

Before each write the live weight must hash to what the ledger wrote last; if not, something else changed the model,
and guessing would lose its work.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from diffedit.delta import Delta, LowRank
from diffedit.errors import (
    AlreadyAppliedError,
    ForeignChangeError,
    ModelBusyError,
    NonFiniteError,
    NoOpError,
    NotAppliedError,
    SwallowedError,
)
from diffedit.interfaces import Backend
from diffedit.site import EditSite

FLOORS = {torch.float64: 0.99, torch.float32: 0.99, torch.float16: 0.95, torch.bfloat16: 0.90}


@dataclass(frozen=True, eq=False)
class Trial:
    """What applying one change to one pristine weight gives.

    Attributes:
        weight: [d_out, d_in], the resulting weight in the model's dtype.
        sha256: hash of the resulting weight, in the model's dtype.
        achieved: share of the requested change that survived the rounding, where the change acts (its row space).
        relative_norm: |change| / |weight|.
    """

    weight: Tensor
    sha256: str
    achieved: float
    relative_norm: float


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of the numbers, row-major, in the tensor's own dtype."""
    data = tensor.detach().cpu().contiguous()
    return hashlib.sha256(data.view(torch.uint8).numpy().data).hexdigest()


class Ledger:
    """Applies and reverts changes of one model; see the module's text.

    Args:
        backend: the model.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._base: dict[EditSite, Tensor] = {}
        self._written: dict[EditSite, str] = {}
        self._active: dict[str, Delta] = {}
        self._lock = threading.Lock()

    @property
    def active(self) -> tuple[str, ...]:
        """Ids of the edits in the model, in the order they were applied."""
        return tuple(self._active)

    def base(self, site: EditSite) -> Tensor:
        """The unedited weight: a copy on the CPU once the site was touched, else the live one."""
        if site in self._base:
            return self._base[site]
        return self._backend.weight(site).detach()

    def trial(self, delta: Delta) -> dict[EditSite, Trial]:
        """What the change alone would make of the unedited weights. Writes nothing; raises what `apply` would raise."""
        out = {}
        for site, change in delta:
            base = self.base(site)
            weight = _sum(site, base, [change])
            achieved = _achieved(site, base, weight, change)
            norm = float(torch.linalg.vector_norm(base, dtype=torch.float64))
            out[site] = Trial(weight, tensor_hash(weight), achieved, change.norm() / norm if norm else float("inf"))
        return out

    def apply(self, edit_id: str, delta: Delta, trial: Mapping[EditSite, Trial] | None = None) -> None:
        """Add an edit to the model.

        Args:
            edit_id: its id.
            delta: its change.
            trial: what `trial` said of this change, to spare computing it again.

        Raises:
            AlreadyAppliedError: it is in the model already.
            ForeignChangeError: the weights are not those that the ledger wrote.
            NonFiniteError, NoOpError, SwallowedError: see `diffedit.errors`; the model is as before.
            ModelBusyError: another thread is writing.
        """
        with self._exclusive():
            if edit_id in self._active:
                raise AlreadyAppliedError(
                    "the edit is in the model already", value=edit_id[:12], hint="revert it first"
                )
            if not delta.factors:
                raise NoOpError("the edit does not change any weight", hint="choose another target or locator")
            if trial is None:
                trial = self.trial(delta)  # beside a large edit, a small one could vanish unseen
            self._rewrite({**self._active, edit_id: delta}, delta.sites, None if self._active else trial)

    def revert(self, edit_id: str) -> None:
        """Take an edit out of the model; the others stay.

        Raises:
            NotAppliedError: it is not in the model.
            ForeignChangeError: the weights are not those that the ledger wrote.
            ModelBusyError: another thread is writing.
        """
        with self._exclusive():
            if edit_id not in self._active:
                raise NotAppliedError("the edit is not in this model", value=edit_id[:12] or None, hint="load it first")
            sites = self._active[edit_id].sites
            self._rewrite({key: delta for key, delta in self._active.items() if key != edit_id}, sites)

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """The pristine weights inside the block; the active edits come back afterwards, bit for bit.

        Edits are solved against the base, so that they load on a pristine model and do not depend on each other's
        order.
        """
        if not self._active:
            yield
            return
        with self._exclusive():
            books = (self._base, self._written, self._active)
            sites = tuple(dict.fromkeys(site for delta in self._active.values() for site in delta.sites))
            live = [self._backend.weight(site).detach() for site in sites]
            before = [(weight, weight.clone()) for weight in live]
            self._rewrite({}, sites)
            foreign = False
            try:
                yield
            finally:
                try:
                    for site in sites:
                        self.check(site)
                except ForeignChangeError:
                    foreign = True
                    raise
                finally:
                    if not foreign:  # from the copies: computing them again could fail, and the edits would be lost
                        try:
                            _copy(before)
                        except BaseException:  # an interrupt: it comes once, and copying again does no harm
                            _copy(before)
                            raise
                        finally:
                            self._base, self._written, self._active = books

    def check(self, site: EditSite) -> None:
        """Raise `ForeignChangeError` unless the live weight is what the ledger wrote (or was never touched)."""
        expected = self._written.get(site)
        if expected is None:
            return
        found = tensor_hash(self._backend.weight(site))
        if found != expected:
            raise ForeignChangeError(
                f"{site.name} was changed by something else",
                value=f"found {found[:12]}, the ledger wrote {expected[:12]}",
                hint="undo that change (for a LoRA: unfuse, unload), or open a new Editor on the model as it is",
            )

    def _rewrite(
        self, active: dict[str, Delta], sites: tuple[EditSite, ...], trial: Mapping[EditSite, Trial] | None = None
    ) -> None:
        """Make `active` the edits in the model: compute every touched weight, then write all or none."""
        live = {site: self._backend.weight(site) for site in sites}
        base: dict[EditSite, Tensor] = {}
        new: dict[EditSite, Tensor] = {}
        hashes: dict[EditSite, str] = {}
        for site in sites:
            self.check(site)
            base[site] = self._base[site] if site in self._base else live[site].detach().to("cpu", copy=True)
            changes = [active[key].factors[site] for key in sorted(active) if site in active[key].factors]
            if trial is not None:
                new[site], hashes[site] = trial[site].weight, trial[site].sha256
            else:
                new[site] = _sum(site, base[site], changes) if changes else base[site]
                hashes[site] = tensor_hash(new[site])
        before = {site: weight.detach().clone() for site, weight in live.items()}
        books = (self._base, self._written, self._active)
        try:
            with torch.no_grad():
                for site, weight in live.items():
                    weight.copy_(new[site])
            # Books last, and only with the weights: a base kept from a refused edit would later undo others' work.
            self._base, self._written, self._active = {**self._base, **base}, {**self._written, **hashes}, active
        except BaseException:
            with torch.no_grad():
                for site, weight in live.items():
                    weight.copy_(before[site])
            self._base, self._written, self._active = books
            raise

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise ModelBusyError(
                "another thread is changing this model", hint="wait for it, or use one Editor per thread"
            )
        try:
            yield
        finally:
            self._lock.release()


def cast_hashes(weight: Tensor) -> dict[str, str]:
    """Hashes of a weight in its own dtype and in each narrower one, by dtype name.

    They let a half-precision copy of the same base be recognised.
    """
    own = weight.dtype
    dtypes = [own, *(d for d in (torch.float32, torch.float16, torch.bfloat16) if d.itemsize < own.itemsize)]
    return {str(dtype).removeprefix("torch."): tensor_hash(weight.detach().to(dtype)) for dtype in dtypes}


def _sum(site: EditSite, base: Tensor, changes: list[LowRank]) -> Tensor:
    """cast(base + changes)."""
    for change in changes:
        change.check_finite(site.name)
    exact = base.double()
    if not _finite(exact):
        bad = int((~torch.isfinite(exact)).sum())
        raise NonFiniteError(
            f"the weight of {site.name} is not finite", value=f"{bad} numbers", hint="reload the model"
        )
    up = torch.cat([change.up.double().to(exact.device) for change in changes], 1)
    down = torch.cat([change.down.double().to(exact.device) for change in changes], 0)
    weight = torch.addmm(exact, up, down).to(base.dtype)
    if not _finite(weight):
        raise NonFiniteError(
            f"the edited weight of {site.name} overflows {base.dtype}", hint="load the model in float32"
        )
    return weight


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for live, kept in pairs:
        live.copy_(kept)


def _achieved(site: EditSite, base: Tensor, weight: Tensor, change: LowRank) -> float:
    """The share of one edit's change that the cast kept; refuses what does next to nothing."""
    exact = base.double()
    up, down = (factor.double().to(exact.device) for factor in (change.up, change.down))
    basis = torch.linalg.qr(down.T).Q
    asked, got = up @ (down @ basis), (weight.double() - exact) @ basis
    total = float((asked * asked).sum())
    if total == 0.0:
        raise NoOpError(f"the edit does not change {site.name}", hint="choose another target, or do not scale it to 0")
    achieved = float((asked * got).sum()) / total
    floor = FLOORS.get(base.dtype, 0.99)
    if achieved < floor:
        raise SwallowedError(
            f"{base.dtype} keeps too little of the change at {site.name}",
            value=f"{achieved:.1%} of it, at least {floor:.0%} is needed",
            cause="the change is smaller than the dtype's rounding step",
            hint="load the model in float32 and edit that",
        )
    return achieved


def _finite(values: Tensor) -> bool:
    """Whether every number is finite: a sum carries any NaN or infinity, and in float64 it does not overflow."""
    return bool(torch.isfinite(values.sum(dtype=torch.float64)))
