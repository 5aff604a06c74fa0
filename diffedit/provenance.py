"""Where an edit comes from: writing that into its manifest, and refusing a model that it was not made for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from diffedit.delta import Delta
from diffedit.errors import AlreadyAppliedError, BaseMismatchError
from diffedit.garbage import postponed
from diffedit.interfaces import Backend, Plugin
from diffedit.io.files import delta_records
from diffedit.io.manifest import BaseRecord, Manifest, PluginRecord, SiteRecord, diagnostics_dict
from diffedit.io.pairs import pairs_records
from diffedit.ledger import Ledger, Trial, tensor_hash
from diffedit.preparing import Prepared
from diffedit.site import EditSite

_PACKAGES = ("diffedit", "diffusers", "safetensors", "torch", "transformers")


@postponed()
def describe(
    backend: Backend, ledger: Ledger, ready: Prepared, delta: Delta, trial: Mapping[EditSite, Trial]
) -> Manifest:
    """The manifest of a solved edit.

    Args:
        backend: the model.
        ledger: its ledger.
        ready: what the solve started from.
        delta: the change, float32 factors.
        trial: what `Ledger.trial` made of it.
    """
    tensors, pairs = delta_records(delta), pairs_records(delta.pairs)
    model = backend.model
    base_record = BaseRecord(
        source=model.source, revision=model.revision, backend=backend.name, fingerprints=backend.fingerprints()
    )
    locator, updater = _record(ready.locator), _record(ready.updater)
    sites = []  # last: the results may still be being hashed
    for site, change in delta:
        base, tried = ledger.base(site), trial[site]
        sites.append(
            SiteRecord(
                component=site.component,
                path=site.path,
                layer=site.layer,
                role=site.role,
                d_out=site.d_out,
                d_in=site.d_in,
                rank=change.rank,
                relative_norm=tried.relative_norm,
                base_sha256=ledger.base_hashes(site),
                result_sha256=tried.sha256,
                achieved=tried.achieved,
                dtype=str(base.dtype).removeprefix("torch."),
                diagnostics=diagnostics_dict(delta.diagnostics.get(site)),
            )
        )
    return Manifest(
        requests=ready.requests,
        target_reasons=ready.reasons,
        tokens=ready.location.tokens,
        locator=locator,
        updater=updater,
        scores=ready.location.scores,
        sites=tuple(sites),
        base=base_record,
        versions={package: _version(package) for package in _PACKAGES},
        tensors=tensors,
        pairs=pairs,
    ).with_id()


def check_base(manifest: Manifest, backend: Backend, ledger: Ledger) -> None:
    """Refuse an edit whose base is not this model.

    A half-precision copy of the base passes (its hash is recorded too); another model of the same shape does not.

    Raises:
        BaseMismatchError: naming both fingerprints.
        AlreadyAppliedError: the weights are the edit's result already.
    """
    sources = f"its base is {manifest.base.source!r}, this is {backend.model.source!r}"
    mine = backend.fingerprints()
    for part, digest in sorted(manifest.base.fingerprints.items()):
        if digest != mine.get(part):
            raise BaseMismatchError(
                f"the edit was made for a model with another {part}",
                value=f"edit {digest[:12]}, model {mine.get(part, 'none')[:12]}",
                cause=sources,
                hint="load the edit's own base",
            )
    for record in manifest.sites:
        base = ledger.base(record.site)
        own = ledger.base_hashes(record.site)
        if any(own.get(name) == digest for name, digest in record.base_sha256.items()):
            continue
        if tensor_hash(base) == record.result_sha256:
            raise AlreadyAppliedError("the weights are this edit's result already", value=manifest.edit_id[:12])
        dtype = str(base.dtype).removeprefix("torch.")
        recorded = ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(record.base_sha256.items()))
        raise BaseMismatchError(
            f"the edit was made for other weights at {record.site.name}",
            value=f"edit {recorded}; model {dtype} {own[dtype][:12]}",
            cause=sources,
            hint="load the edit's own base, or ablate again on this model",
        )


def _record(plugin: Plugin) -> PluginRecord:
    return PluginRecord(name=plugin.name, reference=plugin.reference, settings=plugin.model_dump(mode="json"))


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
