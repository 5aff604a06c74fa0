"""The portable edit: one `edit.safetensors` with the factors and everything that is known about them.

The only metadata key is `diffedit`, canonical JSON of

    {"manifest": {...}, "sha256": <SHA-256 of the canonical JSON of the manifest>}

The manifest holds the SHA-256 of every tensor and, as `edit_id`, of itself. The same edit gives the same bytes; a file
that differs in one bit is refused; what cannot be read back is not written (`encode_edit` reads its own output). The
file is self-contained: cards, LoRA files and folders are derived from it. Hashes find changed bytes, not a forger, who
can compute them as well: sign the folder when that matters.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffedit.delta import Delta, LowRank
from diffedit.errors import (
    IntegrityError,
    MalformedArtifactError,
    NonFiniteError,
    StorageError,
    UnsafeFormatError,
    UnsupportedTensorError,
    UnsupportedVersionError,
)
from diffedit.io.container import MAX_FILE, pack, unpack
from diffedit.io.manifest import FORMAT, FORMAT_VERSION, Manifest, TensorRecord, canonical_json
from diffedit.io.names import tensor_names
from diffedit.io.records import tensor_records
from diffedit.io.strict import loads
from diffedit.storage import read_together

EDIT_FILE = "edit.safetensors"

_KEY = "diffedit"
_UNSAFE_SUFFIXES = {".bin", ".ckpt", ".h5", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
_VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})")


def delta_to_tensors(delta: Delta) -> dict[str, Tensor]:
    """The factors under their names in the file: `<component>.<path>.up` [d_out, r] and `.down` [r, d_in], float32.

    Raises:
        UnsupportedTensorError: factors that are not float32; rounding here would make the saved edit another than the
            one in memory, so the caller rounds first.
        NonFiniteError: a factor holds NaN or infinity.
    """
    tensors: dict[str, Tensor] = {}
    for site, change in delta:
        change.check_finite(site.name)
        for name, factor in zip(tensor_names(site.name), (change.up, change.down), strict=True):
            if factor.dtype is not torch.float32:
                raise UnsupportedTensorError(
                    "an edit file holds float32 factors",
                    value=f"{name} is {factor.dtype}",
                    hint="round the delta first: delta.to(torch.float32)",
                )
            tensors[name] = factor.detach().cpu().contiguous()
    return tensors


def delta_records(delta: Delta) -> dict[str, TensorRecord]:
    """What the manifest says about the factors; see `delta_to_tensors`."""
    return tensor_records(delta_to_tensors(delta))


def tensors_to_delta(manifest: Manifest, tensors: Mapping[str, Tensor]) -> Delta:
    """The delta whose factors are `tensors`, checked against the manifest's sites.

    Raises:
        MalformedArtifactError: a factor is missing, superfluous, not float32, or of another shape than its site says.
    """
    factors = {}
    wanted: set[str] = set()
    for record in manifest.sites:
        site = record.site
        up, down = tensor_names(site.name)
        if up in wanted:
            raise MalformedArtifactError("the edit lists a site twice", value=site.name)
        wanted |= {up, down}
        if not 1 <= record.rank <= min(site.d_out, site.d_in):
            raise MalformedArtifactError("the rank does not fit the layer", value=f"{record.rank} at {site.name}")
        for name, shape in ((up, (site.d_out, record.rank)), (down, (record.rank, site.d_in))):
            tensor = tensors.get(name)
            if tensor is None or tensor.dtype is not torch.float32 or tuple(tensor.shape) != shape:
                found = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise MalformedArtifactError(f"{name} must be float32 {list(shape)}", value=found)
        factors[site] = LowRank(tensors[up], tensors[down])
    if wanted != set(tensors):
        raise MalformedArtifactError("the edit holds tensors of no site", value=sorted(set(tensors) - wanted)[:3])
    return Delta(factors)


def encode_edit(manifest: Manifest, tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of `edit.safetensors`; the same manifest and tensors always give the same.

    Args:
        manifest: complete, with `tensors` from `tensor_records` and its id from `Manifest.with_id`.
        tensors: the factors, see `delta_to_tensors`.

    Raises:
        ArtifactError: the manifest does not describe these tensors, or the result could not be read back.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    where = "the edit being written"
    try:
        # pydantic's JSON mode writes null for NaN, which would read as "not set": look at the values as they are.
        json.dumps([manifest.locator.settings, manifest.updater.settings], allow_nan=False, default=str)
        content = manifest.model_dump(mode="json")
        envelope = {"manifest": content, "sha256": hashlib.sha256(canonical_json(content)).hexdigest()}
        text = canonical_json(envelope).decode("utf-8")
    except (ValueError, TypeError) as error:  # pydantic's serialisation errors are ValueErrors
        raise MalformedArtifactError(
            "the manifest cannot be written as JSON",
            value=str(error)[:200],
            hint="use plain settings: text and finite numbers",
        ) from error
    data = pack({_KEY: text}, tensors)
    decode_edit(data, where)
    return data


def decode_edit(data: bytes, where: str) -> tuple[Manifest, dict[str, Tensor]]:
    """Parse and check the bytes of an edit file; nothing is believed that is not hashed.

    Args:
        data: the whole file.
        where: its name, for messages.

    Returns:
        The manifest and the tensors (CPU), in name order.

    Raises:
        UnsafeFormatError: a pickle or archive.
        UnsupportedVersionError: written by a later version of the format.
        IntegrityError: content and hash differ.
        NonFiniteError: a tensor holds NaN or infinity.
        MalformedArtifactError: anything else.
    """
    metadata, tensors = unpack(data, where)
    if set(metadata) != {_KEY}:
        raise MalformedArtifactError(
            f"{where} is a safetensors file but not an edit",
            value=f"metadata {ascii(sorted(metadata))[:120]}",
            cause="a LoRA or a checkpoint perhaps",
            hint=f"use the {EDIT_FILE} that diffedit saved",
        )
    envelope = loads(metadata[_KEY], where)
    if not isinstance(envelope, dict) or set(envelope) != {"manifest", "sha256"} or _text(envelope) != metadata[_KEY]:
        raise MalformedArtifactError(f"the manifest of {where} is not in canonical form")
    content = envelope["manifest"]
    if hashlib.sha256(canonical_json(content)).hexdigest() != envelope["sha256"]:
        raise IntegrityError(
            f"the manifest of {where} differs from its SHA-256", hint="download or save the file again"
        )
    manifest = _manifest(content, where)
    if manifest.with_id().edit_id != manifest.edit_id:
        raise IntegrityError(
            f"the edit id of {where} does not belong to it",
            value=ascii(manifest.edit_id)[:80],
            hint="Manifest.with_id computes the right one",
        )
    _check_tensors(manifest, tensors, where)
    return manifest, tensors


def read_edit(path: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """Read an edit from a folder that holds `edit.safetensors`, or from the file itself.

    The file is read once, whole, and only then parsed: what is checked is what is used. Symbolic links are followed
    (the Hub's cache consists of them), but only to regular files, so a named pipe or a device never blocks the reader.

    Raises:
        StorageError: no such path, no permission, not a regular file.
        UnsafeFormatError: a pickle-based checkpoint.
        ArtifactError: see `decode_edit`.
    """
    file, data, _ = read_bytes(path)
    return decode_edit(data, str(file))


def read_bytes(path: Path, beside: Sequence[str] = ()) -> tuple[Path, bytes, dict[str, bytes]]:
    """The bytes of an edit, and of files beside it, all as one save left them.

    Args:
        path: the edit's folder, or its file.
        beside: names of other files in the folder; those that are not there are left out.

    Returns:
        The edit's file, its bytes, and the bytes of the others by name.

    Raises:
        StorageError, UnsafeFormatError: see `read_edit`.
    """
    try:
        folder = stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):  # reading says what is wrong
        folder = False
    if path.suffix.lower() in _UNSAFE_SUFFIXES and not folder:
        raise UnsafeFormatError(
            "diffedit never opens pickle-based files",
            value=ascii(str(path)),
            cause="loading one may run code",
            hint=f"use the {EDIT_FILE} that diffedit saved",
        )
    file = path / EDIT_FILE if folder else path
    try:
        found = read_together(file.parent, (file.name, *beside), MAX_FILE + 1)
        return file, found.pop(file.name), found
    except (KeyError, FileNotFoundError) as error:
        raise StorageError(
            f"the folder holds no {EDIT_FILE}" if folder else "there is no such file or folder",
            value=ascii(str(path)),
            cause="it is a plain adapter or another folder" if folder else None,
            hint="name a folder that diffedit saved",
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StorageError("the edit cannot be read", value=ascii(str(path))[:300], cause=reason) from error


def _text(envelope: Mapping[str, Any]) -> str | None:
    """Canonical JSON text, or `None` for text that UTF-8 cannot hold."""
    try:
        return canonical_json(envelope).decode("utf-8")
    except ValueError:
        return None


def _manifest(content: Any, where: str) -> Manifest:
    """The manifest as an object, if it is of this format, of a known version, and complete."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise MalformedArtifactError(f"the manifest of {where} is not that of an edit")
    version = content.get("format_version")
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if match is None:
        raise MalformedArtifactError(f"{where} has no format version", value=ascii(version)[:80])
    major, minor = (int(part) for part in FORMAT_VERSION.split("."))
    later = UnsupportedVersionError(
        f"{where} has a format that this version does not read",
        value=f"{version}, this is {FORMAT_VERSION}",
        hint="upgrade diffedit",
    )
    if int(match[1]) != major:
        raise later
    try:
        manifest = Manifest.model_validate(content)
        same = canonical_json(manifest.model_dump(mode="json")) == canonical_json(content)
    except Exception as error:  # validators see a stranger's values and may raise anything
        if int(match[2]) > minor:
            raise later from error
        raise MalformedArtifactError(
            f"the manifest of {where} is not complete or not valid", value=" ".join(ascii(str(error)).split())[:300]
        ) from error
    if not same:
        raise MalformedArtifactError(
            f"the manifest of {where} is not in canonical form",
            cause="a value has another type than the format says, or a text is not normalised",
        )
    return manifest


def _check_tensors(manifest: Manifest, tensors: Mapping[str, Tensor], where: str) -> None:
    if set(manifest.tensors) != set(tensors):
        odd = sorted(set(manifest.tensors) ^ set(tensors))
        raise MalformedArtifactError(
            f"manifest and tensors of {where} differ", value=", ".join(ascii(n) for n in odd[:3])[:300]
        )
    for name, record in tensor_records(tensors).items():
        if record != manifest.tensors[name]:
            raise IntegrityError(
                f"tensor {name} of {where} differs from its SHA-256, dtype or shape",
                hint="download or save the file again",
            )
        bad = int((~torch.isfinite(tensors[name])).sum())
        if bad:
            raise NonFiniteError(f"tensor {name} of {where} is not finite", value=f"{bad} numbers")
