"""`pairs.safetensors`: what an edit was solved from, beside the edit, for composing it with others later.

    <site>.keys       [n, d_in]     rows of all requests, in order
    <site>.residuals  [n, d_out]
    <site>.held       [m, d_in]     rows of all preserved names, in order (left out if there are none)
    <site>.spread     [n + m, d_in] all of these rows times the inverse of the metric (left out if there is none),
    <site>.metric     [d_in, d_in]  or, for very many rows, the metric's triangular root, and
    <site>.excluded   [z, d_in]     what it excludes, if anything

How many rows belong to whom stands in the edit's manifest, and so do the hashes: the file means nothing without its
edit. Who only wants the change itself does not need it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffedit.errors import IntegrityError, MalformedArtifactError, NonFiniteError
from diffedit.io.container import DTYPE_NAMES, pack, unpack
from diffedit.io.manifest import HeldRecord, Manifest, PairsRecord, WantedRecord
from diffedit.io.records import tensor_records, tensor_sha256
from diffedit.linalg.metric import Metric
from diffedit.pairs import Held, Pairs, Wanted
from diffedit.site import EditSite

PAIRS_FILE = "pairs.safetensors"

_KEY = "diffedit"
_HINT = "restore it, or delete it: then the edit still applies but does not compose"


def _rows(site: EditSite, pairs: Pairs) -> dict[str, list[Tensor]]:
    """One site's tensors by name in the file, each as its rows, entry by entry."""
    tensors = {
        f"{site.name}.keys": [entry.keys for entry in pairs.wanted],
        f"{site.name}.residuals": [entry.residuals for entry in pairs.wanted],
        f"{site.name}.held": [entry.keys for entry in pairs.held],
        f"{site.name}.spread": pairs.spread_parts(),
    }
    if pairs.price is not None:
        tensors[f"{site.name}.metric"] = [pairs.price.root.float()]
        if len(pairs.price.excluded):
            tensors[f"{site.name}.excluded"] = [pairs.price.excluded.float()]
    return {name: parts for name, parts in tensors.items() if parts}


def pairs_records(pairs: Mapping[EditSite, Pairs]) -> dict[str, PairsRecord]:
    """What the manifest says about the pairs, by site name."""
    return {
        site.name: PairsRecord(
            wanted=tuple(WantedRecord(rows=len(e.keys), count=e.count, group=e.group) for e in data.wanted),
            held=tuple(HeldRecord(rows=len(e.keys), count=e.count, group=e.group, name=e.name) for e in data.held),
            weight_norm=data.weight_norm,
            metric=data.metric,
            tensors=tensor_records(_rows(site, data)),
        )
        for site, data in pairs.items()
    }


def pairs_file(pairs: Mapping[EditSite, Pairs], manifest: Manifest) -> bytes:
    """The bytes of `pairs.safetensors`; the same pairs give the same bytes."""
    tensors: dict[str, Tensor] = {}
    for site, data in pairs.items():
        tensors |= {name: torch.cat(rows) for name, rows in _rows(site, data).items()}
    return pack({_KEY: manifest.edit_id}, tensors)


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
    held, spread = tensors.get(f"{name}.held"), tensors.get(f"{name}.spread")
    root, excluded = tensors.get(f"{name}.metric"), tensors.get(f"{name}.excluded")
    wide = (keys, held, spread, root, excluded)
    shapes = [(residuals, site.d_out), *((tensor, site.d_in) for tensor in wide)]
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
        or (spread is not None and len(spread) != sum(wanted_rows) + sum(held_rows))
        or ((spread is not None or root is not None) is not bool(record.metric))
        or (root is not None and (len(root) != site.d_in or not bool(root.diagonal().all())))
        or (excluded is not None and root is None)
    ):
        raise MalformedArtifactError("the rows of the pairs do not add up", value=ascii(name))
    sizes = [*wanted_rows, *held_rows]
    spreads = [None] * len(sizes) if spread is None else list(torch.split(spread, sizes))
    parts = zip(record.wanted, torch.split(keys, wanted_rows), torch.split(residuals, wanted_rows), strict=True)
    wanted = tuple(Wanted(k, r, e.count, e.group, s) for (e, k, r), s in zip(parts, spreads, strict=False))
    still = zip(record.held, torch.split(held, held_rows) if held is not None else (), strict=True)
    kept = tuple(Held(e.name, e.group, k, e.count, s) for (e, k), s in zip(still, spreads[len(wanted) :], strict=True))
    price = None
    if root is not None:
        price = Metric(root.double(), root.new_zeros(0, site.d_in).double() if excluded is None else excluded.double())
    return Pairs(wanted, kept, record.weight_norm, record.metric, price)
