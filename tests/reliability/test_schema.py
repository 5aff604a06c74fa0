"""The published JSON schema is current, valid, and says of saved manifests what the reader says."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from diffedit.errors import DiffEditError
from diffedit.io.files import EDIT_FILE, decode_edit
from tests.reliability import mutations, reader, samples, schema
from tests.unit.io.conftest import forge_manifest, split_file


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    return Draft202012Validator(json.loads(schema.PATH.read_text(encoding="utf-8")))


def content(data: bytes) -> Any:
    return json.loads(split_file(data)[0]["__metadata__"]["diffedit"])["manifest"]


def saved() -> list[bytes]:
    real = [edit.files()[EDIT_FILE] for edit in samples.edits(2)]
    derived = [(samples.edits(1)[0] * 0.5).files()[EDIT_FILE]]
    return [*(edit.data for edit in reader.edits()), *real, *derived]


def test_it_is_current() -> None:
    assert schema.PATH.read_text(encoding="utf-8") == schema.text(), "run python -m tests.reliability.schema"


def test_it_is_a_schema(validator: Draft202012Validator) -> None:
    Draft202012Validator.check_schema(validator.schema)


def test_saved_manifests_pass(validator: Draft202012Validator, tmp_path: Path) -> None:
    for data in saved():
        validator.validate(content(data))
    path = samples.edits(1)[0].save(tmp_path / "edit")
    validator.validate(content((path / EDIT_FILE).read_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        {"format": "zip"},
        {"format_version": "2.0"},
        {"edit_id": ""},
        {"unknown": 1},
        {"sites": [{}]},
        {"requests": [1]},
        {"tokens": "some"},
        {"tensors": {"x": {"dtype": "F32", "shape": [1], "sha256": "00"}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_others_do_not(change: dict[str, Any], validator: Draft202012Validator) -> None:
    with pytest.raises(ValidationError):
        validator.validate(content(reader.edits()[0].data) | change)


def test_every_field_is_required(validator: Draft202012Validator) -> None:
    for data in saved():
        document = content(data)
        for name in document:
            with pytest.raises(ValidationError):
                validator.validate({key: value for key, value in document.items() if key != name})


def test_what_the_reader_accepts_passes(validator: Draft202012Validator) -> None:
    """Forged manifests with every hash right: the schema must not refuse what the reader takes."""
    original = reader.edits()[1]
    accepted = refused = 0
    for number in range(400):
        forged = forge_manifest(original.data, mutations.document(content(original.data), Random(number)))
        try:
            decode_edit(forged, "forged")
        except DiffEditError:
            refused += not validator.is_valid(content(forged))
        else:
            accepted += 1
            validator.validate(content(forged))
    assert accepted > 10 and refused > 100
