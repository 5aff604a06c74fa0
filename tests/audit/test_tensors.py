"""The streaming reader gives what the official one gives, and refuses what has two meanings."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffedit.audit.tensors import TensorFile
from diffedit.errors import ArtifactError, DiffEditError, MalformedArtifactError, StorageError, UnsafeFormatError


def frame(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


@pytest.fixture
def sample(tmp_path):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(6, 5, generator=generator)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    tensors = {f"f.{str(kind)[6:]}": numbers.to(kind) for kind in kinds}
    tensors |= {"i": torch.arange(-3, 3), "b": torch.tensor([True, False]), "none": torch.zeros(0, 4)}
    tensors |= {"one": torch.tensor(3.5), "small": torch.arange(6, dtype=torch.int8).reshape(2, 3)}
    save_file(tensors, tmp_path / "sample.safetensors", {"a": "b"})
    return tmp_path / "sample.safetensors"


def test_every_dtype_reads_as_with_the_official_reader(sample):
    official = load_file(sample)
    with TensorFile(sample) as file:
        assert set(file.entries) == set(official) and file.metadata == {"a": "b"}
        for name, wanted in official.items():
            found = file.tensor(name)
            assert found.dtype == wanted.dtype and found.shape == wanted.shape
            assert torch.equal(found.contiguous().view(-1).view(torch.uint8), wanted.view(-1).view(torch.uint8)), name


def test_rows_of_a_tensor(sample):
    with TensorFile(sample) as file:
        assert torch.equal(file.tensor("f.float32", (2, 4)), load_file(sample)["f.float32"][2:4])


def test_every_truncation_is_refused(tmp_path):
    sample = tmp_path / "sample.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.float16)}, sample)
    data = sample.read_bytes()
    for length in range(len(data)):
        sample.write_bytes(data[:length])
        with pytest.raises(DiffEditError):
            TensorFile(sample)
    sample.write_bytes(data + b"\0")
    with pytest.raises(MalformedArtifactError, match="more than its tensors"):
        TensorFile(sample)


@pytest.mark.parametrize(
    "data",
    [
        frame({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)),  # two tensors share bytes
        frame({"a": entry(0, 2), "b": entry(4, 6)}, bytes(6)),  # bytes of no tensor
        frame({"a": entry(0, 4, [2])}, bytes(4)),  # size and shape disagree
        frame({"a": entry(0, 4, [-4])}, bytes(4)),
        frame({"a": entry(4, 0, [4])}, bytes(4)),
        frame({"a": {**entry(0, 4), "extra": 1}}, bytes(4)),
        frame({"a": {**entry(0, 4), "dtype": 5}}, bytes(4)),
        frame({"a": {**entry(0, 4), "shape": [True, 4]}}, bytes(4)),
        frame(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":1}', bytes(4)),  # a name twice
        frame(b"[" * 100_000),
        frame(b"[]"),
        frame(b"\xff\xfe"),
        b"",
        b"\xff" * 64,
    ],
)
def test_malformed_headers_are_refused(data, tmp_path):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(data)
    with pytest.raises(ArtifactError):
        TensorFile(path)


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt", "MODEL.PTH"])
def test_pickles_are_refused_by_name(name, tmp_path):
    (tmp_path / name).write_bytes(frame({"a": entry(0, 4)}, bytes(4)))
    with pytest.raises(UnsafeFormatError):
        TensorFile(tmp_path / name)


def test_pickles_are_refused_by_content(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(UnsafeFormatError, match="zip archive"):
        TensorFile(path)
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeFormatError, match="pickle"):
        TensorFile(path)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "pipe.safetensors", tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(StorageError):
            TensorFile(path)


def test_a_file_that_shrinks_while_open_is_an_error_and_not_a_crash(sample):
    with TensorFile(sample) as file:
        os.truncate(sample, sample.stat().st_size - 300)
        with pytest.raises(MalformedArtifactError, match="cut short"):
            for name in file.entries:
                file.tensor(name)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """A sparse file of 64 GB: opening it and reading one small tensor costs neither disk nor memory."""
    size = 64 << 30
    path = tmp_path / "large.safetensors"
    with open(path, "wb") as file:
        file.write(frame({"big": entry(0, size), "little": entry(size, size + 4)}))
        file.truncate(file.tell() + size)
        file.seek(0, os.SEEK_END)
        file.write(bytes([1, 2, 3, 4]))
    with TensorFile(path) as file:
        assert file.tensor("little").tolist() == [1, 2, 3, 4]


def test_an_unknown_dtype_is_listed_but_not_turned_into_numbers(tmp_path):
    path = tmp_path / "new.safetensors"
    path.write_bytes(frame({"a": entry(0, 4, [16], "F2_E1M0")}, bytes(4)))
    with TensorFile(path) as file:
        assert file.raw("a") == bytes(4)
        with pytest.raises(MalformedArtifactError, match="unknown dtype"):
            file.tensor("a")
