"""`pairs.safetensors`: what an edit was solved from, beside the edit, for composing it with others later.

    <site>.keys       [n, d_in]     rows of all requests, in order
    <site>.residuals  [n, d_out]
    <site>.held       [m, d_in]     rows of all preserved names, in order (left out if there are none)

How many rows belong to whom stands in the edit's manifest, and so do the hashes: the file means nothing without its
edit. Who only wants the change itself does not need it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffedit.delta import Delta
from diffedit.errors import IntegrityError, MalformedArtifactError, NonFiniteError
from diffedit.io.container import DTYPE_NAMES, pack, unpack
from diffedit.io.files import decode_edit, read_bytes, tensor_records, tensor_sha256, tensors_to_delta
from diffedit.io.manifest import HeldRecord, Manifest, PairsRecord, WantedRecord
from diffedit.pairs import Held, Pairs, Wanted
from diffedit.site import EditSite

PAIRS_FILE = "pairs.safetensors"

_KEY = "diffedit"
_HINT = "restore it, or delete it: then the edit still applies but does not compose"


def pairs_to_tensors(site: EditSite, pairs: Pairs) -> dict[str, Tensor]:
    """One site's rows under their names in the file, on the CPU."""
    tensors = {
        f"{site.name}.keys": torch.cat([entry.keys for entry in pairs.wanted]),
        f"{site.name}.residuals": torch.cat([entry.residuals for entry in pairs.wanted]),
    }
    if pairs.held:
        tensors[f"{site.name}.held"] = torch.cat([entry.keys for entry in pairs.held])
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def pairs_records(pairs: Mapping[EditSite, Pairs]) -> dict[str, PairsRecord]:
    """What the manifest says about the pairs, by site name."""
    return {
        site.name: PairsRecord(
            wanted=tuple(WantedRecord(rows=len(e.keys), count=e.count, group=e.group) for e in data.wanted),
            held=tuple(HeldRecord(rows=len(e.keys), count=e.count, group=e.group, name=e.name) for e in data.held),
            weight_norm=data.weight_norm,
            tensors=tensor_records(pairs_to_tensors(site, data)),
        )
        for site, data in pairs.items()
    }


def pairs_file(pairs: Mapping[EditSite, Pairs], manifest: Manifest) -> bytes:
    """The bytes of `pairs.safetensors`; the same pairs give the same bytes."""
    tensors: dict[str, Tensor] = {}
    for site, data in pairs.items():
        tensors |= pairs_to_tensors(site, data)
    return pack({_KEY: manifest.edit_id}, tensors)


def read_folder(path: Path) -> tuple[Manifest, Delta]:
    """An edit with its pairs, from its folder or its `edit.safetensors`, both files as one save left them.

    Raises:
        ArtifactError: see `read_edit` and `decode_pairs`.
    """
    file, data, beside = read_bytes(path, (PAIRS_FILE,))
    manifest, tensors = decode_edit(data, str(file))
    pairs = {}
    if manifest.pairs and PAIRS_FILE in beside:
        pairs = decode_pairs(beside[PAIRS_FILE], manifest, str(file.parent / PAIRS_FILE))
    return manifest, Delta(tensors_to_delta(manifest, tensors).factors, {}, pairs)


def decode_pairs(data: bytes, manifest: Manifest, where: str) -> dict[EditSite, Pairs]:
    """The pairs of an edit from the bytes of their file, checked against the edit's manifest.

    Args:
        data: the whole file.
        manifest: the edit's.
        where: the file's name, for messages.

    Raises:
        IntegrityError: they are not the ones that the manifest describes.
        MalformedArtifactError: the file is damaged.
        NonFiniteError: a number is infinite or NaN, or too large to be multiplied.
    """
    metadata, tensors = unpack(data, where)
    known = {name: record for site in manifest.pairs.values() for name, record in site.tensors.items()}
    if metadata != {_KEY: manifest.edit_id}:
        raise IntegrityError(f"{PAIRS_FILE} names another edit", value=ascii(metadata)[:120], hint=_HINT)
    for name in sorted(known.keys() | tensors.keys()):
        record, tensor = known.get(name), tensors.get(name)
        if (
            record is None
            or tensor is None
            or (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) != (record.dtype, record.shape)
            or tensor_sha256(tensor) != record.sha256
        ):
            raise IntegrityError(
                f"{PAIRS_FILE} does not belong to its edit",
                value=ascii(name),
                cause="it was changed, or taken from another edit",
                hint=_HINT,
            )
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor.double().square().sum())):
            raise NonFiniteError("the pairs are not finite, or too large to be multiplied", value=ascii(name))
    sites = {record.site.name: record.site for record in manifest.sites}
    if not manifest.pairs.keys() <= sites.keys():
        raise MalformedArtifactError("the edit has pairs of no site", value=ascii(sorted(manifest.pairs))[:120])
    return {
        sites[name]: _pairs(sites[name], record, tensors, len(manifest.requests))
        for name, record in manifest.pairs.items()
    }


def _pairs(site: EditSite, record: PairsRecord, tensors: Mapping[str, Tensor], requests: int) -> Pairs:
    """One site's rows, dealt out to requests and preserved names."""
    name = site.name
    keys, residuals = tensors.get(f"{name}.keys"), tensors.get(f"{name}.residuals")
    held = tensors.get(f"{name}.held")
    shapes = [(keys, site.d_in), (residuals, site.d_out), (held, site.d_in)]
    if any(tensor is not None and (tensor.ndim != 2 or tensor.shape[1] != width) for tensor, width in shapes):
        raise MalformedArtifactError("the pairs do not fit the layer", value=ascii(name))
    wanted_rows, held_rows = [entry.rows for entry in record.wanted], [entry.rows for entry in record.held]
    if (
        keys is None
        or residuals is None
        or len(record.wanted) != requests
        or sum(wanted_rows) != len(keys)
        or sum(wanted_rows) != len(residuals)
        or sum(held_rows) != (len(held) if held is not None else 0)
    ):
        raise MalformedArtifactError("the rows of the pairs do not add up", value=ascii(name))
    wanted = tuple(
        Wanted(k, r, entry.count, entry.group)
        for k, r, entry in zip(
            torch.split(keys, wanted_rows), torch.split(residuals, wanted_rows), record.wanted, strict=True
        )
    )
    parts = torch.split(held, held_rows) if held is not None else ()
    kept = tuple(Held(e.name, e.group, k, e.count) for k, e in zip(parts, record.held, strict=True))
    return Pairs(wanted, kept, record.weight_norm)
