"""Names that try to leave the folder: more than sixty, and not one byte outside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest

from diffedit.edit import Edit
from diffedit.errors import DiffEditError, StorageError
from diffedit.io.files import EDIT_FILE, decode_edit, encode_edit, tensors_to_delta
from diffedit.io.folder import write_folder
from tests.reliability.samples import edits
from tests.unit.io.conftest import build, forge_manifest

# Up and out, in the spellings that some program somewhere understands.
UP = [
    "..", "../x", "../../x", "../../../../../../../../x", "a/../../x", "a/b/../../../x", "./../x", "a/./../../x",
    "..//x", "../", "a/..", ".", "./x", "a/.", "a/./b", "a//b", "/", "//", "a/", "/a", "//host/share/x", "///x",
    "/etc/passwd", "/proc/self/environ", "/dev/null", "/tmp/x", "~/x", "~root/x", "$HOME/x", "${HOME}/x", "%2e%2e/x",
    "..%2fx", "%2e%2e%2fx", "..%252fx", "..%c0%afx", "..;/x", ".../x", "....//x", "..\u2215x", "\uff0e\uff0e/x",
    "..\u2044x", "\u2025/x",
]  # fmt: skip
WINDOWS = [
    "..\\x", "..\\..\\x", "a\\..\\..\\x", "..\\/x", "a/..\\..\\x", "\\x", "\\\\host\\share\\x", "\\\\?\\C:\\x",
    "\\\\.\\COM1", "\\??\\C:\\x", "C:x", "C:\\x", "C:/x", "c:..\\x", "file:///x", "x:stream", "x::$DATA",
    "CON", "con", "con.txt", "PRN", "AUX.safetensors", "NUL", "nul.json", "COM1", "com9.txt", "LPT1", "lpt3.x",
    "CONIN$", "a/NUL", "nul/a", "x.", "x ", " x", "x./y", "x /y", "x...", "COM\u00b9", "CLOCK$",
]  # fmt: skip
ODD = [
    "", "\0", "a\0b", "../\0x", "x\n", "x\r", "x\t", "\x1b[2J", "\x7f", "x\u202excod", "x\u200b", "e\u0301", "\u00e9",
    "\ud800", "x" * 256, "a/" * 4 + "x", "a/" * 2100 + "x", ".git/config", ".hidden", "-x", "--help", "*", "?", "x|y",
    "x;y", "x&y", "$(x)", "`x`", '"x"', "'x'", "<x>", "x y", "#x", "x@y",
]  # fmt: skip
BAD = [*UP, *WINDOWS, *ODD]


def shown(name: str) -> str:
    """A test's id."""
    return ascii(name)[1:40]


def snapshot(root: Path) -> dict[str, Any]:
    """Everything below `root`, with content, kind and time of change."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder) / name
            data = path.read_bytes() if path.is_file() else None
            found[str(path)] = (data, path.lstat().st_mode, path.lstat().st_mtime_ns)
    return found


@pytest.fixture
def arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with neighbours to hit, which is the working folder and the home; what must not change is compared."""
    inside = tmp_path / "a" / "b" / "inside"
    inside.mkdir(parents=True)
    for place in (tmp_path, tmp_path / "a", tmp_path / "a" / "b"):
        (place / "x").write_bytes(b"neighbour")
    monkeypatch.chdir(inside)
    monkeypatch.setenv("HOME", str(tmp_path / "a"))
    before = snapshot(tmp_path)
    yield inside
    after = {name: state for name, state in snapshot(tmp_path).items() if not name.startswith(f"{inside}{os.sep}")}
    # The folder itself may get another time of change: something was made in it.
    before.pop(str(inside)), after.pop(str(inside))
    assert after == before


def test_there_are_enough() -> None:
    assert len(set(UP + WINDOWS)) >= 60 and len(set(BAD)) == len(BAD)


@pytest.mark.parametrize("name", BAD, ids=shown)
def test_no_such_name_is_written(name: str, arena: Path) -> None:
    with pytest.raises(StorageError, match="portable"):
        write_folder(arena / "edit", {EDIT_FILE: b"edit", name: b"x"})
    with pytest.raises(StorageError, match="portable"):
        write_folder(arena / "edit", {EDIT_FILE: b"edit", f"unet/{name}": b"x"})
    assert not os.listdir(arena)


def test_names_that_are_fine(arena: Path) -> None:
    """The control: the same call writes ordinary names, and those stay inside on every system."""
    names = [
        EDIT_FILE,
        "README.md",
        "unet/adapter_config.json",
        "a-b_c.1",
        "console",
        "com",
        "com10",
        "nullable.txt",
        "_x",
    ]
    for name in names:
        for kind in (PurePosixPath, PureWindowsPath):
            assert not kind(name).is_absolute() and ".." not in kind(name).parts and not kind(name).drive
    path = write_folder(arena / "edit", dict.fromkeys(names, b"x"))
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()) == sorted(names)


@pytest.mark.parametrize("name", [name for name in BAD if name not in ("", "a/")], ids=shown)
def test_subjects_never_become_paths(name: str, arena: Path) -> None:
    """The default folder of an edit is named after its subject."""
    made = edits(1)[0]
    request = made.manifest.requests[0].model_copy(update={"subject": name})
    manifest = made.manifest.model_copy(update={"requests": (request,)}).with_id() if name != "\ud800" else None
    if manifest is None:
        return
    edit = Edit(manifest, made.delta)
    assert set(manifest.slug()) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    try:
        path = edit.save()
    except DiffEditError:
        assert not os.listdir(arena)
    else:
        assert path.parent == arena and os.listdir(arena) == [path.name]


FIELDS = [
    ("sites", 0, "path"),
    ("sites", 0, "component"),
    ("base", "source"),
    ("base", "backend"),
    ("updater", "name"),
    ("locator", "name"),
    ("edit_id",),
    ("versions", "diffedit"),
]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: ".".join(map(str, field)))
def test_no_field_of_a_forged_edit_becomes_a_path(field: tuple[Any, ...], arena: Path) -> None:
    """A stranger's edit with every hash right: it is refused, or saving it stays in the folder that was named."""
    made = build()
    accepted = 0
    for name in (*UP[::3], *WINDOWS[::3], "", "\0"):
        content = made.manifest.model_dump(mode="json")
        part = content
        for key in field[:-1]:
            part = part[key]
        part[field[-1]] = name
        try:
            manifest, tensors = decode_edit(forge_manifest(made.data, content), "forged")
            assert encode_edit(manifest, tensors)
            path = Edit(manifest, tensors_to_delta(manifest, tensors)).save(arena / "edit", overwrite=True)
        except DiffEditError:
            continue
        accepted += 1
        assert path == arena / "edit" and os.listdir(arena) == ["edit"]
    assert accepted == 0 or field[0] != "sites"
