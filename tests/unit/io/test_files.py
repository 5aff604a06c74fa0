"""The edit file: round trip, determinism, and that every claim of the manifest is checked."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
from diffedit.io import records
from diffedit.io.container import pack
from diffedit.io.files import (
    EDIT_FILE,
    decode_edit,
    delta_to_tensors,
    encode_edit,
    read_edit,
    tensors_to_delta,
)
from diffedit.io.records import tensor_records, tensor_sha256
from diffedit.site import Role

OUT, FC2 = Role.TEXT_SELF_ATTN_OUT, Role.TEXT_MLP_OUT


@st.composite
def shape_lists(draw: st.DrawFn) -> list[tuple[int, Role, int, int, int]]:
    keys = draw(
        st.lists(st.tuples(st.integers(0, 30), st.sampled_from(list(Role))), min_size=1, max_size=4, unique=True)
    )
    out = []
    for layer, role in keys:
        d_out, d_in = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        out.append((layer, role, d_out, d_in, draw(st.integers(1, min(d_out, d_in)))))
    return out


@settings(deadline=None, max_examples=40)
@given(shape_lists(), st.integers(0, 1000), st.text("abcdé猫🦉 ", min_size=1).filter(lambda text: text.strip()))
def test_round_trip_is_bitwise(make_edit: Any, shapes: Any, seed: int, alias: str) -> None:
    request = {"subject": "cat", "target": "dog", "aliases": (alias + "x",), "preserve": ("owl",)}
    edit = make_edit(shapes, seed=seed, requests=[request])
    manifest, tensors = decode_edit(edit.data, "x")
    assert manifest == edit.manifest
    assert encode_edit(manifest, tensors) == edit.data
    delta = tensors_to_delta(manifest, tensors)
    assert delta.sites == edit.delta.sites
    for (_, read), (_, made) in zip(delta, edit.delta, strict=True):
        assert torch.equal(read.up, made.up) and torch.equal(read.down, made.down)


def test_the_same_edit_gives_the_same_bytes_in_every_process(tiny: Any) -> None:
    code = (
        "import sys, torch\n"
        "from diffedit.io.files import decode_edit, encode_edit\n"
        "data = sys.stdin.buffer.read()\n"
        "sys.stdout.buffer.write(encode_edit(*decode_edit(data, 'x')))\n"
    )
    environment = dict(os.environ, PYTHONHASHSEED="77", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", code], input=tiny.data, capture_output=True, env=environment, check=True
    )
    assert done.stdout == tiny.data
    assert len({encode_edit(tiny.manifest, dict(reversed(tiny.tensors.items()))) for _ in range(50)}) == 1


def test_the_official_reader_loads_it(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(tiny.data)
    loaded = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(tiny.tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tiny.tensors.items())
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert list(file.metadata()) == ["diffedit"]


def test_tensor_names(tiny: Any) -> None:
    name = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"
    assert list(tiny.tensors) == [f"{name}.up", f"{name}.down"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensor_sha256(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -0.0]], dtype=dtype)
    raw = bytes(tensor.view(torch.uint8).flatten().tolist())
    assert tensor_sha256(tensor) == hashlib.sha256(raw).hexdigest()
    assert tensor_sha256(tensor.T) == tensor_sha256(tensor.T.clone(memory_format=torch.contiguous_format))
    assert tensor_sha256(tensor) != tensor_sha256(tensor.abs())  # -0.0 is another number than 0.0


@pytest.mark.parametrize("large", [records._LARGE, 0], ids=["alone", "in threads"])
def test_rows_in_parts_are_one_tensor(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_LARGE", large)
    whole = torch.randn(700, 3, generator=torch.Generator().manual_seed(0))
    parts = [whole[i : i + 5].T.contiguous().T for i in range(0, 700, 5)]  # more than go together, not contiguous
    found = tensor_records({"y": [whole], "x": parts})
    assert found == tensor_records({"x": whole, "y": whole}) and list(found) == ["x", "y"]
    assert found["x"].shape == (700, 3) and found["x"].sha256 == hashlib.sha256(whole.numpy().tobytes()).hexdigest()


def test_sizes(tiny: Any) -> None:
    assert len(tiny.data) < 4096


def test_factors_that_would_be_rounded_are_refused(tiny: Any) -> None:
    with pytest.raises(UnsupportedTensorError, match=r"delta\.to\(torch\.float32\)"):
        delta_to_tensors(tiny.delta.to(torch.float64))


def test_what_is_not_finite_is_not_written(tiny: Any, finish_edit: Any) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        (place,) = tiny.delta.sites
        bad = LowRank(torch.full((3, 1), value), torch.ones(1, 2))
        with pytest.raises(NonFiniteError, match="out_proj"):
            finish_edit(Delta({place: bad}))
        tensors = dict(tiny.tensors)
        name = next(iter(tensors))
        tensors[name] = torch.full_like(tensors[name], value)
        manifest = tiny.manifest.model_copy(update={"tensors": tensor_records(tensors)}).with_id()
        with pytest.raises(NonFiniteError, match=r"3 numbers"):
            encode_edit(manifest, tensors)


def test_a_manifest_of_other_tensors_is_not_written(tiny: Any) -> None:
    name, *_ = tiny.tensors
    with pytest.raises(IntegrityError):
        encode_edit(tiny.manifest, dict(tiny.tensors, **{name: tiny.tensors[name] + 1}))
    with pytest.raises(MalformedArtifactError):
        encode_edit(tiny.manifest, dict(tiny.tensors, more=torch.ones(1)))
    with pytest.raises(IntegrityError, match="edit id"):
        encode_edit(tiny.manifest.model_copy(update={"edit_id": ""}), tiny.tensors)


def test_settings_that_json_cannot_hold_are_not_written(make_edit: Any) -> None:
    good = make_edit()
    for value in (float("nan"), {"deep": [float("inf")]}, object(), 10**30, "\ud800", {1: {2: object()}}):
        updater = good.manifest.updater.model_copy(update={"settings": {"lam": value}})
        with pytest.raises(MalformedArtifactError):
            encode_edit(good.manifest.model_copy(update={"updater": updater}), good.tensors)


def test_a_plain_lora_is_told_apart(tiny: Any) -> None:
    for metadata in ({}, {"format": "pt"}, {"format": "pt", "diffedit": "x"}):
        with pytest.raises(MalformedArtifactError, match="not an edit"):
            decode_edit(pack(metadata, tiny.tensors), "x")


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"manifest":{},"sha256":""}', '{"manifest":"\\ud800","sha256":1}']
)
def test_metadata_that_is_no_manifest(text: str, tiny: Any) -> None:
    with pytest.raises((MalformedArtifactError, IntegrityError)):
        decode_edit(pack({"diffedit": text}, tiny.tensors), "x")


def content_of(edit: Any) -> dict[str, Any]:
    content: dict[str, Any] = edit.manifest.model_dump(mode="json")
    return content


def test_the_forge_is_good(tiny: Any, forge: Callable[..., bytes]) -> None:
    """The control of the next tests: an unchanged manifest through the same hands gives the same file."""
    assert forge(tiny.data, content_of(tiny)) == tiny.data


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.0", "1.1", "1.999"])
def test_other_versions(version: str, tiny: Any, forge: Callable[..., bytes]) -> None:
    content = content_of(tiny) | {"format_version": version, "invented_later": 1}
    with pytest.raises(UnsupportedVersionError, match="does not read"):
        decode_edit(forge(tiny.data, content), "x")


@pytest.mark.parametrize(
    "version", ["1", "1.0.0", "one", "", "-1.0", "99999.0", "1.0 ", "\u0661.\u0660", None, 1.0, ["1.0"]]
)
def test_no_version_at_all(version: Any, tiny: Any, forge: Callable[..., bytes]) -> None:
    with pytest.raises(MalformedArtifactError):
        decode_edit(forge(tiny.data, content_of(tiny) | {"format_version": version}), "x")


CHANGES: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("other format", lambda c: c | {"format": "zip"}),
    ("unknown field", lambda c: c | {"unknown": 1}),
    ("no requests field", lambda c: {k: v for k, v in c.items() if k != "requests"}),
    ("request that is a number", lambda c: c | {"requests": [1]}),
    ("aliases that are a number", lambda c: c | {"requests": [c["requests"][0] | {"aliases": 3}]}),
    ("subject with an article", lambda c: c | {"requests": [c["requests"][0] | {"subject": "a cat"}]}),
    ("subject that is the target", lambda c: c | {"requests": [c["requests"][0] | {"subject": "dog"}]}),
    ("template without a place", lambda c: c | {"requests": [c["requests"][0] | {"templates": ["x"]}]}),
    ("number as text", lambda c: c | {"sites": [c["sites"][0] | {"layer": "0"}]}),
    ("float as integer", lambda c: c | {"sites": [c["sites"][0] | {"rank": 1.0}]}),
    ("short hash", lambda c: c | {"sites": [c["sites"][0] | {"result_sha256": "00"}]}),
    ("path with a slash", lambda c: c | {"sites": [c["sites"][0] | {"path": "a/b"}]}),
    ("unknown role", lambda c: c | {"sites": [c["sites"][0] | {"role": "unet"}]}),
    ("missing tensor record", lambda c: c | {"tensors": dict(list(c["tensors"].items())[:1])}),
    ("one more tensor record", lambda c: c | {"tensors": c["tensors"] | {"x": next(iter(c["tensors"].values()))}}),
    ("list as manifest", lambda c: [c]),
    ("tensors as a list", lambda c: c | {"tensors": []}),
]


@pytest.mark.parametrize("change", [c[1] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_manifests_that_do_not_hold_together(change: Any, tiny: Any, forge: Callable[..., bytes]) -> None:
    with pytest.raises(MalformedArtifactError):
        decode_edit(forge(tiny.data, change(content_of(tiny))), "x")


def test_manifest_hashes_are_checked(tiny: Any, split: Any, frame: Any) -> None:
    header, payload = split(tiny.data)
    text = header["__metadata__"]["diffedit"]
    header["__metadata__"]["diffedit"] = text.replace("quickfix", "slowfixx")
    with pytest.raises(IntegrityError, match="SHA-256"):
        decode_edit(frame(header, payload), "x")


def test_the_edit_id_is_checked(tiny: Any, split: Any, frame: Any) -> None:
    header, payload = split(tiny.data)
    content = content_of(tiny) | {"edit_id": "0" * 64}
    from diffedit.io.manifest import canonical_json

    envelope = {"manifest": content, "sha256": hashlib.sha256(canonical_json(content)).hexdigest()}
    header["__metadata__"]["diffedit"] = canonical_json(envelope).decode()
    with pytest.raises(IntegrityError, match="edit id"):
        decode_edit(frame(header, payload), "x")


@pytest.mark.parametrize("field", ["dtype", "shape", "sha256"])
def test_tensor_records_are_checked(field: str, tiny: Any, forge: Callable[..., bytes]) -> None:
    content = content_of(tiny)
    name = next(iter(content["tensors"]))
    other = {"dtype": "F16", "shape": [1, 3], "sha256": "0" * 64}[field]
    content["tensors"][name][field] = other
    with pytest.raises(IntegrityError, match=r"\.(up|down) of x"):
        decode_edit(forge(tiny.data, content), "x")


def test_sites_and_factors_have_to_fit(make_edit: Any) -> None:
    edit = make_edit([(0, OUT, 4, 3, 2), (1, FC2, 2, 5, 1)])
    record, other = edit.manifest.sites

    def manifest_with(*sites: Any) -> Any:
        return edit.manifest.model_copy(update={"sites": sites})

    assert tensors_to_delta(manifest_with(record, other), edit.tensors).sites == edit.delta.sites
    bad = [
        manifest_with(record),
        manifest_with(record, record, other),
        manifest_with(
            record, other, other.model_copy(update={"layer": 2, "path": "text_model.encoder.layers.2.mlp.fc2"})
        ),
        *(
            manifest_with(record.model_copy(update=update), other)
            for update in ({"rank": 1}, {"rank": 0}, {"rank": 9}, {"d_out": 5}, {"d_in": 2}, {"component": "unet"})
        ),
    ]
    for manifest in bad:
        with pytest.raises(MalformedArtifactError):
            tensors_to_delta(manifest, edit.tensors)
    with pytest.raises(MalformedArtifactError, match="float32"):
        tensors_to_delta(edit.manifest, {name: tensor.half() for name, tensor in edit.tensors.items()})


def test_read_from_folder_file_and_link(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / EDIT_FILE).write_bytes(tiny.data)
    (tmp_path / "renamed.safetensors").write_bytes(tiny.data)
    (tmp_path / "link.safetensors").symlink_to("renamed.safetensors")  # the Hub's cache consists of links
    for path in (tmp_path, tmp_path / EDIT_FILE, tmp_path / "renamed.safetensors", tmp_path / "link.safetensors"):
        manifest, tensors = read_edit(path)
        assert manifest == tiny.manifest and encode_edit(manifest, tensors) == tiny.data


def test_paths_that_hold_no_edit(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("missing", "folder", "loop", "dangling", "a\0b", "x" * 300, "\ud800"):
        with pytest.raises(StorageError):
            read_edit(tmp_path / name)
    with pytest.raises(StorageError, match=r"holds no edit\.safetensors"):
        read_edit(tmp_path / "folder")
    (tmp_path / "folder" / EDIT_FILE).mkdir()
    with pytest.raises(StorageError, match="not a regular file"):
        read_edit(tmp_path / "folder")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pkl", ".PT", ".pth"])
def test_pickles_are_not_even_opened(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    os.mkfifo(path)  # reading it would block
    with pytest.raises(UnsafeFormatError, match="never opens"):
        read_edit(path)


def test_pickles_under_a_safe_name(tmp_path: Path) -> None:
    path = tmp_path / EDIT_FILE
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(UnsafeFormatError, match="zip"):
        read_edit(tmp_path)
    torch.save({"weight": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeFormatError, match="pickle"):
        read_edit(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"")
    with pytest.raises(UnsafeFormatError, match="zip"):
        read_edit(path)


def test_pipes_sockets_and_devices_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / EDIT_FILE)
    names = ["pipe.safetensors", "socket.safetensors", "folder"]
    with socket.socket(socket.AF_UNIX) as listener, alarm(60):
        listener.bind(str(tmp_path / "socket.safetensors"))
        for path in (*(tmp_path / name for name in names), Path("/dev/zero")):
            with pytest.raises(StorageError, match="not a regular file"):
                read_edit(path)


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Fail instead of waiting for ever."""

    def ring(*_: Any) -> None:
        raise TimeoutError("the reader hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_file_that_changes_after_it_was_read_is_harmless(tiny: Any, tmp_path: Path) -> None:
    """A memory-mapped reader would see the new bytes, or die of SIGBUS once the file is cut."""
    path = tmp_path / EDIT_FILE
    path.write_bytes(tiny.data)
    manifest, tensors = read_edit(path)
    path.write_bytes(b"")
    assert encode_edit(manifest, tensors) == tiny.data
