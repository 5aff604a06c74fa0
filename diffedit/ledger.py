"""The only code that writes model weights.

    W = cast(W0 + sum of the active edits' changes)

For every touched weight the ledger keeps the original bytes on the CPU. A write is tried on a copy first and
refused as a whole if anything is wrong; reverting recomputes from the original and never subtracts, so it is exact
to the bit in every dtype. The sum runs in float64 in the order of the edits' ids: the same set of edits gives the
same bits in whatever order it was applied.

Before each write the live weight must be what the ledger wrote last, to the bit; if not, something else changed the
model, and guessing would lose its work.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from diffedit.delta import Delta
from diffedit.errors import (
    AlreadyAppliedError,
    ForeignChangeError,
    ModelBusyError,
    NoOpError,
    NotAppliedError,
    UnsupportedModelError,
)
from diffedit.interfaces import Backend
from diffedit.rounding import Hashing, Known, achieved_share, dtype_name, rounded_sum, same_bits
from diffedit.rounding import cast_hashes as cast_hashes
from diffedit.rounding import tensor_hash as tensor_hash
from diffedit.site import EditSite


@dataclass(frozen=True, eq=False)
class Trial:
    """What applying one change to one pristine weight gives.

    Attributes:
        weight: [d_out, d_in], the resulting weight in the model's dtype.
        achieved: share of the requested change that survived the rounding, where the change acts (its row space).
        relative_norm: |change| / |weight|.
        hashing: of the resulting weight.
    """

    weight: Tensor
    achieved: float
    relative_norm: float
    hashing: Hashing

    @property
    def sha256(self) -> str:
        """Hash of the resulting weight, in the model's dtype; waits for it, so ask late."""
        return self.hashing.sha256


class Ledger:
    """Applies and reverts changes of one model; see the module's text.

    Args:
        backend: the model.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._base: dict[EditSite, Tensor] = {}
        self._known: dict[EditSite, Known] = {}  # of the copies in _base
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

    def base_hashes(self, site: EditSite) -> dict[str, str]:
        """`cast_hashes` of the unedited weight; computed once for a weight that the ledger keeps a copy of."""
        return dict(self._known_base(site).hashes)

    def trial(self, delta: Delta) -> dict[EditSite, Trial]:
        """What the change alone would make of the unedited weights. Writes nothing; raises what `apply` would raise."""
        out = {}
        for site, change in delta:
            known = self._known_base(site)
            made = rounded_sum(site, known.weight, [change])
            size = change.norm()
            achieved = achieved_share(site, known.weight.dtype, size**2, made.got)
            if known.norm == 0.0:
                raise UnsupportedModelError(
                    f"the weight of {site.name} is zero", cause="nothing is stored there", hint="choose another layer"
                )
            relative = size / known.norm
            out[site] = Trial(made.weight, achieved, relative, made.hashing)
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
        live, kept = self._backend.weight(site), self._base.get(site)
        known = self._known.get(site)
        if known is not None and known.weight is kept and expected == known.hashes[dtype_name(known.weight.dtype)]:
            if same_bits(live, known.weight):  # many times faster than hashing
                return
        found = tensor_hash(live)
        if found != expected:
            raise ForeignChangeError(
                f"{site.name} was changed by something else",
                value=f"found {found[:12]}, the ledger wrote {expected[:12]}",
                hint="undo that change (for a LoRA: unfuse, unload), or open a new Editor on the model as it is",
            )

    def _known_base(self, site: EditSite) -> Known:
        """What is known of the unedited weight: kept for a copy of the ledger's own, new for a live weight."""
        base = self.base(site)
        known = self._known.get(site)
        if known is None or known.weight is not base:
            known = Known(base)
            if site in self._base:
                self._known[site] = known
        return known

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
            elif changes:
                made = rounded_sum(site, base[site], changes)
                new[site], hashes[site] = made.weight, made.hashing.sha256
            else:
                new[site] = base[site]
                kept = self.base_hashes(site) if site in self._base else None
                hashes[site] = tensor_hash(new[site]) if kept is None else kept[dtype_name(new[site].dtype)]
        held = {site for delta in self._active.values() for site in delta.sites}  # others are the base to the bit
        before = {site: weight.detach().clone() if site in held else base[site] for site, weight in live.items()}
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


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for live, kept in pairs:
        live.copy_(kept)
