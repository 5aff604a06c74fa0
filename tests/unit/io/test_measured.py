"""Measurements travel with the edit that was measured, byte for byte, and with no other."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffedit import Edit, verify
from diffedit.errors import MalformedArtifactError, RequestError, UnsupportedVersionError
from diffedit.io.manifest import canonical_json
from diffedit.io.measured import MAX_BYTES, Measured, Metric, decode_measured

METRICS = (Metric("efficacy", 0.98, 0.02, (0.93, 1.0), 50, "a judge"), Metric("fidelity mmd", -0.5))


@pytest.fixture
def edit(make_edit: Any) -> Edit:
    made = make_edit()
    return Edit(made.manifest, made.delta)


@pytest.fixture
def measured(edit: Edit) -> Measured:
    return Measured(edit_id=edit.id, metrics=METRICS, judge="a judge", weights=("a", "b"), versions={"torch": "2.9"})


def test_they_survive_load_save_and_copy(edit: Edit, measured: Measured, tmp_path: Any) -> None:
    assert "measured.json" not in edit.files() and "Nothing was measured" in edit.files()["README.md"].decode()
    before = edit.id
    edit.record(measured)
    first = edit.save(tmp_path / "first")
    again = Edit.load(first)
    assert again.measured == measured and again.id == before
    second = again.copy().save(tmp_path / "second")
    for name in ("README.md", "measured.json", "edit.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert "| efficacy | 0.02 | 0.98 | 0.93 to 1 | 50 | a judge |" in (second / "README.md").read_text()
    assert Edit.load(first / "edit.safetensors").measured == measured
    again.record(None)
    again.save(first, overwrite=True)
    assert not (first / "measured.json").exists() and Edit.load(first).measured is None


def test_an_edit_with_other_numbers_has_none(edit: Edit, measured: Measured, make_edit: Any, tmp_path: Any) -> None:
    edit.record(measured)
    half = edit * 0.5
    assert half.measured is None and "Nothing was measured" in half.files()["README.md"].decode()
    with pytest.raises(RequestError, match="another edit"):
        half.record(measured)
    assert half.measured is None
    other = make_edit(((0, half.manifest.sites[0].role, 3, 2, 2),))  # another rank
    assert Edit(other.manifest, other.delta).id != edit.id


def test_measurements_of_another_edit_are_left_out_and_fail_verification(
    edit: Edit, measured: Measured, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    half = (edit * 0.5).save(tmp_path / "half")
    (half / "measured.json").write_bytes(measured.to_json())
    with caplog.at_level(logging.WARNING, "diffedit"):
        loaded = Edit.load(half)
    assert loaded.measured is None and edit.id[:12] in caplog.text
    found = verify(half)
    assert [check.name for check in found.failed] == ["measured.json"] and "another edit" in found.summary()
    loaded.save(half, overwrite=True)
    assert verify(half).ok and not (half / "measured.json").exists()


def test_a_measured_folder_verifies(edit: Edit, measured: Measured, tmp_path: Any) -> None:
    edit.record(measured)
    folder = edit.save(tmp_path / "edit")
    found = verify(folder)
    assert found.ok and all(check.outcome != "changed" for check in found.checks), found.summary()
    assert any(check.name == "measured.json" and "2 numbers" in check.detail for check in found.checks)
    (folder / "measured.json").write_bytes(measured.to_json()[:-5])
    assert [check.name for check in verify(folder).failed] == ["measured.json"]
    with pytest.raises(MalformedArtifactError):
        Edit.load(folder)
    (folder / "measured.json").unlink()
    assert "README.md" in {check.name for check in verify(folder).unverified}


def test_the_bytes_are_fixed() -> None:
    golden = (
        b'{"edit_id":"' + b"0" * 64 + b'","format":"diffedit-measured","format_version":"1.0","judge":"j",'
        b'"judge_digest":"","metrics":[{"base":null,"how":"","interval":[0.0,1.0],"n":3,"name":"a","value":0.5}],'
        b'"model":"","versions":{},"weights":["x","y"]}\n'
    )
    made = Measured(edit_id="0" * 64, metrics=(Metric("a", 0.5, interval=(0, 1), n=3),), judge="j", weights=("x", "y"))
    assert made.to_json() == golden and decode_measured(golden, "here") == made


def altered(**fields: Any) -> bytes:
    content = json.loads(Measured(edit_id="0" * 64, metrics=METRICS).to_json()) | fields
    return canonical_json(content) + b"\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"a":1,"a":1}',
        altered(format="diffedit-edit"),
        altered(more=1),
        altered(edit_id="A" * 64),
        altered(metrics=[{"name": "a", "value": "0.5"}]),
        altered(metrics=[{"name": "a", "value": 0.5, "more": 1}]),
        altered(metrics=[{"name": "a", "value": 0.5}]),  # not canonical: defaults are written out
        altered(metrics=None),
        altered(judge="x" * 1001),
        altered(format_version="1"),
        altered(format_version="1.0.0"),
        altered()[:-1],
        b" " + altered(),
        b" " * (MAX_BYTES + 1),
        altered().replace(b"0.98", b"1e999"),
        altered().replace(b"0.98", b"NaN"),
    ],
)
def test_one_form_is_accepted(data: bytes) -> None:
    with pytest.raises(MalformedArtifactError):
        decode_measured(data, "here")


@pytest.mark.parametrize("data", [altered(format_version="2.0"), altered(format_version="1.1", more=1)])
def test_a_later_version_says_so(data: bytes) -> None:
    with pytest.raises(UnsupportedVersionError, match="Upgrade"):
        decode_measured(data, "here")


@settings(max_examples=100, derandomize=True, deadline=None)
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_changed_byte_is_another_document_or_refused(place: int, byte: int) -> None:
    data = bytearray(altered())
    data[place % len(data)] = byte
    try:
        read = decode_measured(bytes(data), "here")
    except (MalformedArtifactError, UnsupportedVersionError):
        return
    assert read.to_json() == bytes(data)
