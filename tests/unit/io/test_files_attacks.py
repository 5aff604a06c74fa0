"""Every bit, every length, and thousands of mutated files: an edit as it was saved, or one of our errors."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from diffedit.errors import DiffEditError
from diffedit.io.files import decode_edit, encode_edit


def outcome(data: bytes) -> str:
    """ "same" if it loads (and then it must be canonical: saving gives the same bytes), else the name of our error.

    Anything else that escapes fails the test.
    """
    try:
        manifest, tensors = decode_edit(data, "x")
    except DiffEditError as error:
        assert str(error)
        return type(error).__name__
    assert encode_edit(manifest, tensors) == data
    return "same"


def test_every_flipped_bit_is_noticed(tiny: Any) -> None:
    assert outcome(tiny.data) == "same"
    seen: dict[str, int] = {}
    data = bytearray(tiny.data)
    for position in range(8 * len(data)):
        data[position // 8] ^= 1 << position % 8
        result = outcome(bytes(data))
        data[position // 8] ^= 1 << position % 8
        seen[result] = seen.get(result, 0) + 1
    assert "same" not in seen, seen
    assert sum(seen.values()) == 8 * len(tiny.data)
    assert {"IntegrityError", "MalformedArtifactError"} <= set(seen)


def test_every_truncation_and_every_small_extension_is_noticed(tiny: Any) -> None:
    for length in range(len(tiny.data)):
        assert outcome(tiny.data[:length]) != "same", length
    for extra in (1, 7, 8, 64):
        assert outcome(tiny.data + bytes(extra)) != "same"
        assert outcome(bytes(extra) + tiny.data) != "same"


def test_tensors_of_equal_shape_cannot_change_places(make_edit: Any) -> None:
    from diffedit.site import Role

    edit = make_edit([(0, Role.TEXT_SELF_ATTN_OUT, 3, 3, 1), (1, Role.TEXT_SELF_ATTN_OUT, 3, 3, 1)])
    payload = edit.data[-48:]
    for i in range(4):
        for j in range(i):
            blocks = [payload[12 * k : 12 * k + 12] for k in range(4)]
            blocks[i], blocks[j] = blocks[j], blocks[i]
            assert outcome(edit.data[:-48] + b"".join(blocks)) == "IntegrityError"


ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 2**64, 10**18, 0.0, -0.0, 1.5, 1e308, 1e-320,
    "", "a", "\0", "\ud800", "../x", "a dog", "{}", "x" * 300, "{" * 50, [], {}, [[]], [{}], {"": {}}, [None],
    [0, 0], ["a", "a"],
]  # fmt: skip


def walk(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all parts of a JSON document."""
    found = [path]
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += walk(child, (*path, key))
    return found


def mutate_json(document: Any, rng: random.Random) -> Any:
    """One to three changes of structure or value, anywhere in the document."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(walk(document)[1:] or [()])
        if not path:
            return copy.deepcopy(rng.choice(ODD))
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        key = path[-1]
        action = rng.randrange(6)
        if action == 0:
            del parent[key]
        elif action == 1 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] += rng.choice([-8, -1, 1, 8, 0.5])
        elif action == 2 and isinstance(parent[key], str) and parent[key]:
            text, at = parent[key], rng.randrange(len(parent[key]))
            parent[key] = text[:at] + rng.choice(["", "a", " ", "\u202e", "0", "\n"]) + text[at + 1 :]
        elif action == 3 and isinstance(parent, dict):
            parent[rng.choice(["a", "", key + "x", "extra", key.upper()])] = parent[key]
        elif action == 4 and isinstance(parent, list):
            parent.append(json.loads(json.dumps(parent[key])))
        else:
            parent[key] = copy.deepcopy(rng.choice(ODD))
    return document


def mutate_bytes(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, splices with another edit, repeated and overwritten stretches, magic numbers."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        stop = min(len(out), at + rng.choice([1, 2, 8, 64, 1000]))
        action = rng.randrange(8)
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
            out[:8] = rng.choice([0, 1, 8, len(out), 2**20, 2**63, 2**64 - 1, rng.getrandbits(64)]).to_bytes(
                8, "little"
            )
        elif action == 6:
            out[at:at] = rng.choice([b"[", b"{", b'"', b"\\", b"NaN", b"1e999", b"\xff", b"\0", b'"a":1,', b"[" * 500])
        else:
            out[at:] = other[at:]
    return bytes(out)


def mutate_header(data: bytes, rng: random.Random, split: Any, frame: Any) -> bytes:
    """Another header over the same data, canonical or not, sometimes with a key twice."""
    header, payload = split(data)
    out: bytes = frame(mutate_json(header, rng), payload, canonical=rng.random() < 0.8)
    if rng.random() < 0.1:
        length = int.from_bytes(out[:8], "little")
        text = out[8 : 8 + length].rstrip().replace(b'"dtype":', b'"dtype":"F64","dtype":', 1)
        out = len(text).to_bytes(8, "little") + text + payload
    return out


def run(cases: int, seed: int, make_edit: Any, split: Any, frame: Any, forge: Callable[..., bytes]) -> dict[str, int]:
    from diffedit.site import Role

    one = make_edit()
    two = make_edit([(0, Role.TEXT_SELF_ATTN_OUT, 3, 2, 1), (1, Role.TEXT_MLP_OUT, 2, 4, 2)], seed=1)
    content = one.manifest.model_dump(mode="json")
    rng = random.Random(seed)
    seen: dict[str, int] = {}
    for _ in range(cases):
        kind = rng.randrange(4)
        if kind == 0:
            data = mutate_bytes(one.data, two.data, rng)
        elif kind == 1:
            data = mutate_header(rng.choice([one, two]).data, rng, split, frame)
        else:
            data = forge(one.data, mutate_json(content, rng))
        start = time.process_time()
        result = outcome(data)
        assert time.process_time() - start < 5.0
        if result == "same" and kind < 2:
            assert data in (one.data, two.data)  # without a forger's new hashes nothing changed may load
        seen[result] = seen.get(result, 0) + 1
    return seen


def test_mutated_files(make_edit: Any, split: Any, frame: Any, forge: Any) -> None:
    seen = run(6_000, 0, make_edit, split, frame, forge)
    assert {"MalformedArtifactError", "IntegrityError", "UnsupportedVersionError", "same"} <= set(seen), seen


@pytest.mark.slow
def test_many_mutated_files(make_edit: Any, split: Any, frame: Any, forge: Any) -> None:
    run(500_000, 1, make_edit, split, frame, forge)
