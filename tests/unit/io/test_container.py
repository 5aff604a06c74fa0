"""The safetensors container: canonical bytes that the official reader loads, and nothing else accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffedit.errors import DiffEditError, MalformedArtifactError, UnsafeFormatError, UnsupportedTensorError
from diffedit.io.container import DTYPES, MAX_HEADER, MAX_TENSORS, pack, tensor_bytes, unpack

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The raw bits, in which -0.0 and NaN payloads differ."""
    return tensor.contiguous().reshape(-1).view(INTEGERS[tensor.dtype.itemsize])


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(st.lists(st.from_regex(r"\A[A-Za-z0-9_.]{1,12}\Z"), unique=True, max_size=5))
    out = {}
    for name in names:
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(1, 4), max_size=4))
        count = int(np.prod(shape))
        raw = draw(st.binary(min_size=count * DTYPES[dtype].itemsize, max_size=count * DTYPES[dtype].itemsize))
        out[name] = torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).reshape(shape)
    return out


@settings(deadline=None)
@given(tensors(), st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3))
def test_round_trip_is_bitwise_and_canonical(content: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    data = pack(metadata, content)
    assert pack(dict(reversed(metadata.items())), dict(reversed(content.items()))) == data
    told, read = unpack(data, "x")
    assert told == metadata and list(read) == sorted(content)
    for name, tensor in content.items():
        assert read[name].dtype is tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(bits(read[name]), bits(tensor))
    assert pack(told, read) == data


@settings(deadline=None, max_examples=50)
@given(tensors())
def test_the_official_reader_agrees(content: dict[str, torch.Tensor]) -> None:
    official = safetensors.torch.load(pack({"a": "b", "c": "d"}, content))
    assert set(official) == set(content)
    for name, tensor in content.items():
        assert official[name].dtype is tensor.dtype and official[name].shape == tensor.shape
        assert torch.equal(bits(official[name]), bits(tensor))


def test_the_official_reader_opens_mixed_dtypes_from_disk(tmp_path: Any) -> None:
    """Memory-mapped tensors need aligned offsets; sorting by name alone would not give them."""
    content = {"a": torch.ones(3, dtype=torch.float16), "b": torch.ones(3), "c": torch.ones(1, dtype=torch.float64)}
    (tmp_path / "x.safetensors").write_bytes(pack({}, content))
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in content.items())


def test_bytes_do_not_depend_on_memory_layout() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    assert tensor_bytes(base.T) == tensor_bytes(base.T.contiguous()) != tensor_bytes(base)
    assert tensor_bytes(base[:, 1]) == tensor_bytes(base[:, 1].clone())
    assert tensor_bytes(torch.tensor([1.0])) == b"\x00\x00\x80\x3f"  # little-endian, whatever the machine
    assert tensor_bytes(torch.tensor(1.0, dtype=torch.bfloat16, requires_grad=True)) == b"\x80\x3f"


def test_tensors_that_are_read_own_their_memory() -> None:
    data = pack({}, {"a": torch.ones(2)})
    _, first = unpack(data, "x")
    first["a"].zero_()
    assert torch.equal(unpack(data, "x")[1]["a"], torch.ones(2))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, dtype=torch.int64),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2, dtype=torch.float8_e4m3fn),
        torch.ones(2, device="meta"),
        torch.ones(2, 2).to_sparse(),
    ],
)
def test_tensors_without_plain_floats_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(UnsupportedTensorError):
        pack({}, {"a": tensor})


@pytest.mark.parametrize("name", ["", "a" * 257, "../a", "a/b", "a b", "a\0", "ä", "a\n"])
def test_names_that_no_layer_has_are_not_written(name: str) -> None:
    with pytest.raises(MalformedArtifactError):
        pack({}, {name: torch.ones(1)})


def test_a_tensor_cannot_take_the_place_of_the_metadata() -> None:
    with pytest.raises(MalformedArtifactError):
        pack({"a": "b"}, {"__metadata__": torch.ones(1)})


def test_zero_sized_and_deep_tensors_are_not_written() -> None:
    for tensor in (torch.ones(0), torch.ones(2, 0), torch.ones(1, 1, 1, 1, 1)):
        with pytest.raises(MalformedArtifactError):
            pack({}, {"a": tensor})


def test_too_many_tensors_and_too_long_headers_are_not_written() -> None:
    one = torch.ones(1)
    with pytest.raises(MalformedArtifactError, match="too many"):
        pack({}, {f"t{i}": one for i in range(MAX_TENSORS + 1)})
    with pytest.raises(MalformedArtifactError, match="larger"):
        pack({"a": "b" * MAX_HEADER}, {"a": one})


GOOD: dict[str, Any] = {
    "__metadata__": {"k": "v"},
    "a": {"data_offsets": [0, 8], "dtype": "F32", "shape": [2]},
    "b": {"data_offsets": [8, 12], "dtype": "F32", "shape": [1]},
}


def test_the_hand_made_header_is_good(frame: Callable[..., bytes]) -> None:
    """The control of the next tests: without their one change the same file loads."""
    assert set(unpack(frame(GOOD, bytes(12)), "x")[1]) == {"a", "b"}


CHANGES: list[tuple[str, Callable[[Any], Any]]] = [
    ("metadata that is a list", lambda h: h | {"__metadata__": []}),
    ("metadata that is a number", lambda h: h | {"__metadata__": {"k": 1}}),
    ("unknown field", lambda h: h | {"a": h["a"] | {"extra": 1}}),
    ("missing field", lambda h: h | {"a": {"dtype": "F32", "shape": [2]}}),
    ("entry that is a list", lambda h: h | {"a": [1]}),
    ("unknown dtype", lambda h: h | {"a": h["a"] | {"dtype": "I32"}}),
    ("fp8", lambda h: h | {"a": h["a"] | {"dtype": "F8_E4M3"}}),
    ("dtype that is a list", lambda h: h | {"a": h["a"] | {"dtype": []}}),
    ("hole", lambda h: h | {"b": h["b"] | {"data_offsets": [9, 13]}}),
    ("overlap", lambda h: h | {"b": h["b"] | {"data_offsets": [4, 8]}}),
    ("same place", lambda h: h | {"b": h["a"]}),
    ("swapped order", lambda h: h | {"a": h["b"] | {"data_offsets": [4, 8]}, "b": h["a"] | {"data_offsets": [0, 4]}}),
    ("reversed offsets", lambda h: h | {"a": h["a"] | {"data_offsets": [8, 0]}}),
    ("negative offset", lambda h: h | {"a": h["a"] | {"data_offsets": [-8, 0]}}),
    ("offset 2^63", lambda h: h | {"b": h["b"] | {"data_offsets": [8, 2**63]}}),
    ("three offsets", lambda h: h | {"a": h["a"] | {"data_offsets": [0, 8, 8]}}),
    ("offsets as floats", lambda h: h | {"a": h["a"] | {"data_offsets": [0.0, 8.0]}}),
    ("offsets as booleans", lambda h: h | {"a": {"data_offsets": [False, 8], "dtype": "F32", "shape": [2]}}),
    ("shape 2^62 x 0", lambda h: h | {"a": h["a"] | {"shape": [2**62, 0]}}),
    ("shape overflow", lambda h: h | {"a": h["a"] | {"shape": [2**32, 2**32]}}),
    ("shape negative", lambda h: h | {"a": h["a"] | {"shape": [-1, -2]}}),
    ("shape true", lambda h: h | {"b": h["b"] | {"shape": [True]}}),
    ("five dimensions", lambda h: h | {"a": h["a"] | {"shape": [2, 1, 1, 1, 1]}}),
    ("wrong count", lambda h: h | {"a": h["a"] | {"shape": [3]}}),
    ("path as name", lambda h: {"__metadata__": {}, "../../etc/passwd": h["a"], "b": h["b"]}),
    ("empty name", lambda h: {"": h["a"], "b": h["b"]}),
    ("a list as header", lambda h: [h]),
    ("a text as header", lambda h: "a"),
    ("no tensors but data", lambda h: {"__metadata__": {}}),
]


@pytest.mark.parametrize("change", [c[1] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_bad_headers_are_refused(change: Callable[[Any], Any], frame: Callable[..., bytes]) -> None:
    with pytest.raises(MalformedArtifactError):
        unpack(frame(change(json.loads(json.dumps(GOOD))), bytes(12)), "x")


def test_only_the_canonical_header_is_accepted(frame: Callable[..., bytes]) -> None:
    good = frame(GOOD, bytes(12))
    length = int.from_bytes(good[:8], "little")
    text = good[8 : 8 + length].rstrip(b" ")
    variants = [
        b" " + text,
        text + b"\n",
        text.replace(b",", b", "),
        text.replace(b'"k"', b'"\\u006b"'),
        text.replace(b"[0,8]", b"[0,8.0]"),
        text.replace(b"[0,8]", b"[0,08]"),
        text.replace(b"[0,8]", b"[-0,8]"),
        json.dumps(dict(reversed(GOOD.items())), separators=(",", ":")).encode(),
        text[:-1] + b',"a":{"data_offsets":[0,8],"dtype":"F32","shape":[2]}}',
        b"\xef\xbb\xbf" + text,
        text.replace(b'"v"', b'"\xff"'),
        text.replace(b'"v"', b'"\\ud800"'),
    ]
    for variant in variants:
        for padded in (variant + b" " * (-len(variant) % 8), variant):
            with pytest.raises(MalformedArtifactError):
                unpack(len(padded).to_bytes(8, "little") + padded + bytes(12), "x")
    for extra in (8, 16):
        with pytest.raises(MalformedArtifactError):
            unpack((length + extra).to_bytes(8, "little") + good[8 : 8 + length] + b" " * extra + bytes(12), "x")


def test_data_may_be_neither_longer_nor_shorter(frame: Callable[..., bytes]) -> None:
    for size in (0, 11, 13, 24):
        with pytest.raises(MalformedArtifactError, match="wrong length"):
            unpack(frame(GOOD, bytes(size)), "x")


@pytest.mark.parametrize(
    "head",
    [
        b"PK\x03\x04",
        b"PK\x05\x06",
        b"\x80\x02}q\x00.",
        b"\x80\x05\x95",
        b"\x89HDF\r\n\x1a\n",
        b"\x93NUMPY",
        b"\x1f\x8b\x08",
    ],
)
def test_pickles_and_archives_are_named_as_such(head: bytes) -> None:
    for data in (head, head + b"\xff" * 64):
        with pytest.raises(UnsafeFormatError) as caught:
            unpack(data, "x")
        assert "x is not safetensors but" in str(caught.value)


def test_a_header_length_that_starts_like_a_pickle_is_no_pickle() -> None:
    """0x80 is a pickle's first byte and a fine low byte of a length."""
    for filling in range(400):
        data = pack({"k": "v" * filling}, {"a": torch.ones(1)})
        if data[0] == 0x80:
            break
    assert data[0] == 0x80
    assert unpack(data, "x")[0] == {"k": "v" * filling}


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER, MAX_HEADER + 1, 2**63, 2**64 - 1])
def test_impossible_header_lengths(length: int) -> None:
    with pytest.raises(DiffEditError):
        unpack(length.to_bytes(8, "little") + b"{}" + bytes(32), "x")
