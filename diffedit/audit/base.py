"""Checks of an edit against its base: is it that model, and does applying give what was recorded.

A weight is recognised by SHA-256 in its own dtype, or in a narrower one that was recorded too: then it is a
half-precision copy, for which the hash of the result does not hold. The result is computed as the ledger computes it
for a write, and not written. The sum runs in float64: another machine's BLAS may round a rare number differently, so a
result that differs on other hardware is a reason to look, not yet a proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffedit.audit.checks import Check, failed
from diffedit.edit import Edit
from diffedit.errors import DiffEditError, ModelNotFoundError
from diffedit.interfaces import Backend
from diffedit.io.manifest import SiteRecord
from diffedit.ledger import Ledger, cast_hashes, tensor_hash
from diffedit.preparing import choose_backend

_EXACT = "exact"


def check_against_base(edit: Edit, base: Any, **loading: Any) -> tuple[str, list[Check]]:
    """The base's name, and the checks of fingerprints, weights and result.

    Args:
        edit: from the folder.
        base: whatever names a model, or a pipeline.
        loading: `revision`, `token` and `config` for `load_model`.

    Raises:
        DiffEditError: the base cannot be opened.
    """
    records = edit.manifest.sites
    if not records:
        raise ModelNotFoundError("the edit lists no site, so there is nothing to check in a base")
    named = isinstance(base, str) or hasattr(base, "__fspath__")
    dtype = getattr(torch, records[0].dtype, None) if named else None
    text_only = named and all(record.component.startswith("text_encoder") for record in records)
    backend = choose_backend(base, None, dtype=dtype, text_only=text_only, **loading)
    checks = _fingerprints(edit, backend)
    for record in records:
        name = f"base: {record.site.name}"
        try:
            good, what = _recognise(record, backend)
            checks.append(Check(name=name, outcome="pass" if good else "fail", detail=what))
        except DiffEditError as error:
            checks.append(failed(name, error))
    checks.append(_result(edit, backend, checks))
    return backend.model.source, checks


def _fingerprints(edit: Edit, backend: Backend) -> list[Check]:
    mine, checks = backend.fingerprints(), []
    for part, digest in sorted(edit.manifest.base.fingerprints.items()):
        same = mine.get(part) == digest
        detail = digest[:12] if same else f"edit {digest[:12]}, model {mine.get(part, 'none')[:12]}"
        checks.append(Check(name=f"base: {part}", outcome="pass" if same else "fail", detail=detail))
    return checks


def _recognise(record: SiteRecord, backend: Backend) -> tuple[bool, str]:
    """Whether the live weight is the recorded one, and in what sense; `_EXACT` if to the bit."""
    weight = backend.weight(record.site).detach()
    own, dtype = cast_hashes(weight), str(weight.dtype).removeprefix("torch.")
    for name in sorted(own.keys() & record.base_sha256.keys(), key=lambda name: name != record.dtype):
        if own[name] != record.base_sha256[name]:
            continue
        if name != record.dtype:
            return True, f"half-precision copy ({name})"
        return True, _EXACT if dtype == name else f"the same in {name}, held in {dtype}"
    if record.result_sha256 is not None and tensor_hash(weight) == record.result_sha256:
        return False, "mismatch: the weight is this edit's result already"
    recorded = ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(record.base_sha256.items()))
    return False, f"mismatch: recorded {recorded}; found {dtype} {own[dtype][:12]}"


def _result(edit: Edit, backend: Backend, checks: Sequence[Check]) -> Check:
    """Whether applying gives the recorded weights."""
    records = edit.manifest.sites
    if any(check.outcome == "fail" for check in checks):
        return Check(name="result", outcome="skipped", detail="this is not the edit's base")
    if any(record.result_sha256 is None for record in records):
        detail = "nothing recorded: the edit was composed or scaled and has not met a model since"
        return Check(name="result", outcome="skipped", detail=detail)
    weights = {f"base: {record.site.name}" for record in records}
    copies = sorted({check.detail for check in checks if check.name in weights and check.detail != _EXACT})
    if copies:
        detail = f"recorded for {records[0].dtype} weights to the bit, and these are not: {copies[0]}"
        return Check(name="result", outcome="skipped", detail=detail)
    try:
        trial = Ledger(backend).trial(edit.delta)
    except DiffEditError as error:
        return failed("result", error)
    wrong = [record.site.name for record in records if trial[record.site].sha256 != record.result_sha256]
    if wrong:
        detail = f"applying gives other weights than recorded at {', '.join(wrong)}"
        return Check(name="result", outcome="fail", detail=detail)
    return Check(name="result", outcome="pass", detail=f"applying gives the recorded weights at {len(records)} sites")
