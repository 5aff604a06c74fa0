"""What the reader does with a file: the one question that every attack here asks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffedit.edit import Edit, compose
from diffedit.errors import DiffEditError
from diffedit.io.files import EDIT_FILE, decode_edit, encode_edit, tensors_to_delta
from diffedit.io.pairs import PAIRS_FILE
from diffedit.site import Role
from tests.unit.io.conftest import MadeEdit, build

SAME = "byte-identical"


def edits() -> tuple[MadeEdit, ...]:
    """The smallest edit, and one of two sites with more text."""
    request = {"subject": "caf\u00e9 owl", "target": "dog", "aliases": ("\u732b",), "preserve": ("fox", "bee")}
    sites = [(0, Role.TEXT_SELF_ATTN_OUT, 3, 2, 1), (1, Role.TEXT_MLP_OUT, 2, 4, 2)]
    return build(), build(sites, seed=1, requests=[request], settings={"lam": 0.01, "note": None, "layers": [0, 1]})


def outcome(data: bytes) -> str:
    """`SAME` if the file loads and saving it again gives the very same bytes, else the class of our error.

    An edit that loads is also used as far as that goes without a model: looked at, and made into all files of its
    folder. Whatever escapes that is no error of ours fails the caller.
    """
    try:
        manifest, tensors = decode_edit(data, "case")
    except DiffEditError as error:
        return _typed(error)
    if encode_edit(manifest, tensors) != data:
        raise AssertionError("a file was accepted that is not the one that saving its content gives")
    try:
        edit = Edit(manifest, tensors_to_delta(manifest, tensors))
    except DiffEditError as error:
        return _typed(error)
    _use(edit)
    return SAME


def folder_outcome(folder: Path, files: Mapping[str, bytes]) -> str:
    """The same question for an edit and its pairs, which only a folder can hold; they are also composed and scaled."""
    for name in (EDIT_FILE, PAIRS_FILE):
        (folder / name).write_bytes(files[name])
    try:
        edit = Edit.load(folder)
    except DiffEditError as error:
        return _typed(error)
    made = _use(edit)
    names = (EDIT_FILE, PAIRS_FILE) if edit.delta.pairs else (EDIT_FILE,)  # pairs that no manifest names are not read
    if made is not None and any(made.get(name) != files[name] for name in names):
        raise AssertionError("a folder was accepted that is not the one that saving its content gives")
    for derive in (lambda: edit * 0.5, lambda: compose([edit]), lambda: edit.without(edit.requests[0].subject)):
        try:
            _use(derive())
        except DiffEditError as error:
            _typed(error)
    edit.conflicts(edit)
    return SAME


def _use(edit: Edit) -> dict[str, bytes] | None:
    """Everything that needs no model; the edit's files if it has any."""
    edit.summary()
    repr(edit)
    try:
        return edit.files()
    except DiffEditError as error:
        _typed(error)
        return None


def _typed(error: DiffEditError) -> str:
    if not (error.case and error.code in str(error) and str(error).isprintable()):
        raise AssertionError(f"an error that cannot be shown: {error!r}") from error
    return type(error).__name__
