"""Strict JSON: everything that Python's parser lets pass and that two readers could read differently."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffedit.errors import MalformedArtifactError
from diffedit.io.strict import MAX_DEPTH, loads

documents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None, max_examples=50)
@given(documents, st.booleans())
def test_reads_what_json_reads(document: object, ascii_only: bool) -> None:
    text = json.dumps(document, ensure_ascii=ascii_only)
    assert loads(text, "x") == document


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1,]",
        "[1] 2",
        '{"a":1,"a":1}',
        '[{"b":{"a":1,"c":2,"a":3}}]',
        '{"a":1,"\\u0061":2}',
        "NaN",
        "[Infinity]",
        '{"a":-Infinity}',
        "[1e999]",
        "[-1e999]",
        "9" * 20,
        "-" + "9" * 20,
        "9" * 5000,
        "\ufeff{}",
        '"\x00"',
        "'a'",
    ],
)
def test_refuses(text: str) -> None:
    with pytest.raises(MalformedArtifactError):
        loads(text, "x")


def test_an_integer_at_the_limit_is_read() -> None:
    assert loads("-" + "9" * 19, "x") == -(10**19 - 1)


def test_depth_limit_is_exact_and_ignores_brackets_in_text() -> None:
    assert loads("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")
    with pytest.raises(MalformedArtifactError, match="nested too deeply"):
        loads("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "x")
    text = json.dumps(["[" * 1000 + '"{\\' + "[" * 1000])
    assert loads(text, "x") == json.loads(text)


@pytest.mark.parametrize("bomb", ["[" * 1_000_000, '{"a":' * 200_000, '"' + '\\"' * 500_000, "[" + '"' * 999_999])
def test_bombs_end_quickly(bomb: str) -> None:
    start = time.process_time()
    with pytest.raises(MalformedArtifactError):
        loads(bomb, "x")
    assert time.process_time() - start < 2.0


def test_message_names_the_file_and_the_repeated_key() -> None:
    with pytest.raises(MalformedArtifactError, match=r"my\.safetensors repeats the key 'twice'"):
        loads('{"once":1,"twice":2,"twice":3}', "my.safetensors")
