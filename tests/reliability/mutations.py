"""Broken and forged edit files, made with knowledge of their structure.

Random bytes die at the first check of a reader. These cases come from real files and break one layer at a time, so that
every layer is reached:

    raw        flips, cuts, splices of two edits, repeats, overwritten stretches, false header lengths, other formats
    header     another safetensors header over the same data: entries, offsets, dtypes, shapes, names
    text       the header's JSON as text: keys twice, NaN, 1e999, nesting, escapes, white space, other encodings
    envelope   the manifest's text inside the metadata, its hash left alone
    forged     another manifest with every hash of it made right again, as a skilled forger would
    pairs      the file of pairs broken at any of these layers, or taken from another edit
    false      other pairs with every hash made right again: other rows, shapes, dtypes, numbers

All randomness comes from the `Random` that is passed in: a case is reproduced by its seed.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from diffedit.io.container import pack
from diffedit.io.files import EDIT_FILE
from diffedit.io.pairs import PAIRS_FILE
from tests.unit.io.conftest import MadeEdit, forge_manifest, reframe, split_file

KINDS = ("raw", "header", "text", "envelope", "forged", "pairs", "false")

_NUMBERS: list[Any] = [
    0, 1, -1, 2, 7, 255, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, -(2**63), 2**64, 10**18, 10**19, 10**400,
    0.0, -0.0, 0.5, 1e308, 1e-320,
]  # fmt: skip
_TEXTS = [
    "", "a", "\0", "\x1b[31m", "\ud800", "\u202e", "\u200b", "e\u0301", "\u00e9", "\uff43\uff41\uff54", "../x", "..\\x",
    "/etc/passwd", "C:\\x", "con", "a dog", "{}", "{0}", "%s", "<script>", "<|endoftext|>", "x" * 300, "{" * 50, "=1+1",
    "-->", "`x`", "::set-output name=a::b", "1.0", "NaN", "null", "F32", "I64",
]  # fmt: skip
_ODD: list[Any] = [None, True, False, *_NUMBERS, *_TEXTS, [], {}, [[]], [{}], {"": {}}, [None], [0, 0], ["a", "a"]]
_NAMES = ["", ".", "..", "../../etc/passwd", "a/b", "a\\b", "a\0b", "a b", "\u00e9", "e\u0301", "\u202ea", "x" * 257,
          "__metadata__", "__class__", "a.up", "a..up", "A.UP", "\ud800"]  # fmt: skip
_DTYPES = ["F16", "BF16", "F32", "F64", "I8", "I32", "I64", "U8", "BOOL", "C64", "F8_E4M3", "F8_E5M2", "F4", "f32", ""]
_SHAPES: list[Any] = [
    [], [0], [1], [2, 0], [2**62, 0], [2**32, 2**32], [-1, -3], [1, 1, 1, 1, 1], [3, True], [3.0], ["3"], [[3]], 3, "3",
]  # fmt: skip
_TENSORS: list[Callable[[Tensor], Tensor]] = [
    torch.zeros_like, lambda t: t * torch.nan, lambda t: t + torch.inf, lambda t: t * 1e38, lambda t: t * 1e-45,
    lambda t: t[:1], lambda t: t.T.contiguous(), lambda t: t.flatten(), lambda t: t[0, 0].clone(), lambda t: t[None],
    lambda t: torch.cat([t, t]), lambda t: torch.cat([t, t], 1), lambda t: t.half(), lambda t: t.double(),
    torch.ones_like, lambda t: t[:1].expand_as(t).contiguous(), lambda t: t[:, :1].contiguous(),
]  # fmt: skip
_INSERTS = [b"[", b"{", b"]", b"}", b'"', b"\\", b",", b":", b"NaN", b"1e999", b"-", b"\xff", b"\0", b'"a":1,', b"\n"]
_VERSIONS = ["2.0", "1.1", "1.999", "0.9", "99999.0", "1", "1.0.0", "1.0 ", "", None, 1.0]
_SPACES = [b" ", b"\n", b"\t", b"\x0c", b"\xc2\xa0", b"/**/", b"\xef\xbb\xbf"]
_MAGIC = [b"PK\x03\x04", b"\x80\x02", b"\x80\x05\x95", b"\x89HDF", b"\x93NUMPY", b"\x1f\x8b", b"GGUF", b"BM", b"<html>"]


class Mutator:
    """Makes cases from a few intact edits.

    Args:
        edits: small edit files, at least two, so that one can be spliced into the other.
        folders: the files of at least two edits with pairs.
    """

    def __init__(self, edits: Sequence[MadeEdit], folders: Sequence[Mapping[str, bytes]]) -> None:
        self.edits = tuple(edits)
        self.folders = tuple({name: files[name] for name in (EDIT_FILE, PAIRS_FILE)} for files in folders)

    def case(self, rng: Random) -> tuple[str, dict[str, bytes]]:
        """One broken edit, by file name, and the layer that was broken."""
        kind = rng.choice(KINDS)
        edit = rng.choice(self.edits)
        if kind == "raw":
            data = raw(edit.data, rng.choice(self.edits).data, rng)
        elif kind == "header":
            data = header(edit.data, rng)
        elif kind == "text":
            data = header_text(edit.data, rng)
        elif kind == "envelope":
            data = envelope(edit.data, rng)
        elif kind == "forged":
            content = edit.manifest.model_dump(mode="json")
            if rng.random() < 0.05:
                content["format_version"] = rng.choice(_VERSIONS)
            data = forge_manifest(edit.data, document(content, rng))
        else:
            files, other = rng.sample(self.folders, 2)
            return kind, pairs(files, other, rng) if kind == "pairs" else false_pairs(files, rng)
        return kind, {EDIT_FILE: data}


def pairs(files: Mapping[str, bytes], other: Mapping[str, bytes], rng: Random) -> dict[str, bytes]:
    """An intact edit beside a file of pairs that is broken, or another edit's."""
    data = files[PAIRS_FILE]
    document_, payload = split_file(data)
    document_["__metadata__"] = rng.choice([{}, {"diffedit": ""}, {"diffedit": "0" * 64}, {"format": "pt"}])
    changes: list[Callable[[], bytes]] = [
        lambda: raw(data, other[PAIRS_FILE], rng),
        lambda: header(data, rng),
        lambda: header_text(data, rng),
        lambda: reframe(document_, payload),
        lambda: other[PAIRS_FILE],
        lambda: files[EDIT_FILE],
    ]
    return {EDIT_FILE: files[EDIT_FILE], PAIRS_FILE: rng.choice(changes)()}


def false_pairs(files: Mapping[str, bytes], rng: Random) -> dict[str, bytes]:
    """Pairs that no solve gave, with records, hashes and ids that fit them."""
    head, payload = split_file(files[PAIRS_FILE])
    content = json.loads(split_file(files[EDIT_FILE])[0]["__metadata__"]["diffedit"])["manifest"]
    records = {name: record for site in content["pairs"].values() for name, record in site["tensors"].items()}
    tensors = safetensors.torch.load(files[PAIRS_FILE])
    if rng.random() < 0.6:
        name = rng.choice(sorted(tensors))
        tensors[name] = rng.choice(_TENSORS)(tensors[name])
        files_ = {PAIRS_FILE: pack({}, tensors)}
        head, payload = split_file(files_[PAIRS_FILE])
        spans = {name: entry["data_offsets"] for name, entry in head.items() if name != "__metadata__"}
        for name, record in records.items():
            start, stop = spans[name]
            record["sha256"] = hashlib.sha256(payload[start:stop]).hexdigest()
            record["dtype"], record["shape"] = head[name]["dtype"], head[name]["shape"]
    if rng.random() < 0.7:
        content["pairs"] = document(content["pairs"], rng)
    if rng.random() < 0.2:
        content = document(content, rng)
    edit = forge_manifest(files[EDIT_FILE], content)
    forged = json.loads(split_file(edit)[0]["__metadata__"]["diffedit"])["manifest"]
    head["__metadata__"] = {"diffedit": forged.get("edit_id") if isinstance(forged, dict) else None}
    if not isinstance(head["__metadata__"]["diffedit"], str):
        head["__metadata__"] = {}
    return {EDIT_FILE: edit, PAIRS_FILE: reframe(head, payload)}


def raw(data: bytes, other: bytes, rng: Random) -> bytes:
    """One to four changes that know nothing but where the header length is."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        stop = min(len(out), at + rng.choice([1, 2, 8, 64, 1000]))
        action = rng.randrange(10)
        if action == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del out[at:stop]
        elif action == 2:
            out[at:at] = out[at:stop]
        elif action == 3:
            out[at:stop] = other[at:stop]
        elif action == 4:
            out[at:stop] = rng.randbytes(stop - at)
        elif action == 5:
            length = rng.choice([0, 1, 8, len(out), 2**20, 2**20 + 1, 2**63, 2**64 - 1, rng.getrandbits(64)])
            out[:8] = length.to_bytes(8, "little")
        elif action == 6:
            out[at:at] = rng.choice([*_INSERTS, b"[" * 500, b"\0" * 4096])
        elif action == 7:
            del out[at:]
        elif action == 8:
            magic = rng.choice(_MAGIC)
            out[: rng.choice([0, len(magic)])] = magic
        else:
            out[at:] = other[at:]
    return bytes(out)


def header(data: bytes, rng: Random) -> bytes:
    """Another header over the same data, mostly in canonical JSON, so that the layers behind it are reached."""
    document_, payload = split_file(data)
    names = [name for name in document_ if name != "__metadata__"]
    name = rng.choice(names)
    entry = document_[name]
    action = rng.randrange(9)
    if action == 0:
        entry["data_offsets"][rng.randrange(2)] += rng.choice([-8, -4, -1, 1, 4, 8])
    elif action == 1:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(_NUMBERS)
    elif action == 2:
        entry["dtype"] = rng.choice(_DTYPES)
    elif action == 3:
        entry["shape"] = rng.choice([*_SHAPES, entry["shape"][::-1], [*entry["shape"], 1]])
    elif action == 4:
        document_[rng.choice(_NAMES)] = document_.pop(name)
    elif action == 5:
        other = rng.choice(names)
        document_[name], document_[other] = document_[other], document_[name]
    elif action == 6:
        entry[rng.choice(["extra", "Dtype", "", "data_offset"])] = copy.deepcopy(rng.choice(_ODD))
    elif action == 7:
        document_ |= {f"t{i}": entry for i in range(rng.choice([1] * 9 + [5000]))}
    else:
        document_ = document(document_, rng)
    if rng.random() < 0.2:
        payload = rng.choice([payload[:-1], payload + b"\0", b"", payload[::-1], payload * 2])
    return reframe(document_, payload, canonical=rng.random() < 0.9)


def header_text(data: bytes, rng: Random) -> bytes:
    """The header as text: what a JSON parser may read in two ways, or not at all."""
    length = int.from_bytes(data[:8], "little")
    text, payload = data[8 : 8 + length].rstrip(b" "), data[8 + length :]
    spots = [i for i, byte in enumerate(text) if byte in b'{}[]:,"']
    at = rng.choice(spots)
    depth = rng.choice([31, 33, 1000, 100_000])
    changes: list[Callable[[], bytes]] = [
        lambda: text.replace(b'"dtype":', b'"dtype":"F64","dtype":', 1),
        lambda: text[:-1] + b"," + text[1:],
        lambda: text.replace(b"[0,", rng.choice([b"[NaN,", b"[Infinity,", b"[1e999,", b"[-0,", b"[00,", b"[0.0,"]), 1),
        lambda: text[:at] + b"[" * depth + b"]" * depth + text[at:],
        lambda: text[:at] + b'{"a":' * depth + text[at:],
        lambda: text[:at] + rng.choice(_SPACES) + text[at:],
        lambda: text.replace(b"e", rng.choice([b"\\u0065", b"\\ud800", b"\xff", b"\xed\xa0\x80", b"\xc0\xae"]), 1),
        lambda: text.decode().encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-7"])),
        lambda: text[:at] + rng.choice(_INSERTS) + text[at + 1 :],
        lambda: text[:at] + b"9" * rng.choice([19, 20, 5000]) + text[at:],
        lambda: text + rng.choice([b"\n", b"{}", b"\0", text]),
        lambda: b"[" + text + b"]",
    ]
    changed = rng.choice(changes)()
    changed += b" " * (-len(changed) % 8 if rng.random() < 0.9 else rng.randrange(9))
    return len(changed).to_bytes(8, "little") + changed + payload


def envelope(data: bytes, rng: Random) -> bytes:
    """The manifest's text in the metadata changed, or keys added beside it, without new hashes."""
    document_, payload = split_file(data)
    metadata = document_["__metadata__"]
    text = metadata["diffedit"]
    action = rng.randrange(5)
    if action == 0:
        metadata["diffedit"] = json.dumps(
            document(json.loads(text), rng), sort_keys=True, separators=(",", ":"), ensure_ascii=False
        )
    elif action == 1:
        at = rng.randrange(len(text))
        metadata["diffedit"] = text[:at] + rng.choice(["", "a", " ", "0", "\\", '"', "\u202e", "\0"]) + text[at + 1 :]
    elif action == 2:
        metadata[rng.choice(["format", "diffedit ", "", "sha256"])] = rng.choice(_TEXTS)
    elif action == 3:
        metadata["diffedit"] = rng.choice(
            [*_TEXTS, text * 2, text[:-1], text.upper(), "[" * 5000, text.replace(":", ": ")]
        )
    else:
        document_["__metadata__"] = copy.deepcopy(rng.choice([*_ODD, {}, {"diffedit": 1}, {"diffedit": {"a": "b"}}]))
    return reframe(document_, payload)


def document(value: Any, rng: Random) -> Any:
    """One to three changes of structure or value, anywhere in a JSON document."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(_paths(value)[1:] or [()])
        if not path:
            return copy.deepcopy(rng.choice(_ODD))
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        _change(parent, path[-1], rng)
    return value


def _change(parent: Any, key: Any, rng: Random) -> None:
    action = rng.randrange(7)
    old = parent[key]
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(old, int | float) and not isinstance(old, bool):
        step = rng.choice([-8, -1, 1, 8, 0.5])
        parent[key] = old + (step if abs(old) < 1e300 else int(step))  # an earlier change may have left 10 ** 400
    elif action == 2 and isinstance(old, str) and old:
        at = rng.randrange(len(old))
        parent[key] = old[:at] + rng.choice(["", "a", " ", "\u202e", "0", "\n", "\u0301"]) + old[at + 1 :]
    elif action == 3 and isinstance(parent, dict):
        parent[rng.choice(["a", "", f"{key}x", "extra", str(key).upper()])] = copy.deepcopy(old)
    elif action == 4 and isinstance(parent, list):
        parent.extend(copy.deepcopy(old) for _ in range(rng.choice([1, 1, 1000])))
    elif action == 5 and isinstance(parent, list):
        rng.shuffle(parent)
    else:
        parent[key] = copy.deepcopy(rng.choice(_ODD))


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all parts of a JSON document."""
    found = [path]
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += _paths(child, (*path, key))
    return found
