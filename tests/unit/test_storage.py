"""Reading several files of one folder as one save left them, whatever other programs do meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from diffedit import storage
from diffedit.storage import exchange, read_regular, read_together

pytestmark = pytest.mark.skipif(os.name != "posix", reason="looking up names in an open folder")

NAMES = ("a", "b")


def folder(path: Path, content: bytes) -> Path:
    path.mkdir()
    for name in NAMES:
        (path / name).write_bytes(content)
    return path


def interfere(monkeypatch: pytest.MonkeyPatch, after: int, act: Any) -> list[int]:
    """Calls `act` after the `after`-th file was read, each time that many were; returns the running count."""
    count = [0]

    def reading(*args: Any, **keywords: Any) -> bytes:
        data = read_regular(*args, **keywords)
        count[0] += 1
        if count[0] % 2 == after % 2:
            act()
        return data

    monkeypatch.setattr(storage, "read_regular", reading)
    return count


def test_files_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", b"1")
    assert read_together(path, ("a", "missing", "b"), 10) == {"a": b"1", "b": b"1"}
    assert read_together(path, (), 10) == {}
    with pytest.raises(FileNotFoundError):
        read_together(tmp_path / "missing", NAMES, 10)
    with pytest.raises(NotADirectoryError):
        read_together(path / "a", NAMES, 10)


def test_at_most_the_limit_is_read_and_links_are_followed(tmp_path: Path) -> None:
    """The Hub's cache consists of links into another folder."""
    path = tmp_path / "snapshot"
    path.mkdir()
    (tmp_path / "blob").write_bytes(b"12345")
    (path / "a").symlink_to("../blob")
    assert read_together(path, NAMES, 3) == {"a": b"123"}
    (tmp_path / "link").symlink_to("snapshot")
    assert read_together(tmp_path / "link", NAMES, 9) == {"a": b"12345"}


def test_pipes_do_not_hang(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", b"1")
    os.mkfifo(path / "c")
    with pytest.raises(OSError, match="not a regular file"):
        read_together(path, ("a", "c"), 10)


def test_a_folder_that_is_swapped_between_two_reads_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = folder(tmp_path / "x", b"old"), folder(tmp_path / "y", b"new")
    swaps = iter([True])

    def swap() -> None:
        if next(swaps, False):
            assert exchange(old, new)

    count = interfere(monkeypatch, 1, swap)
    assert read_together(old, NAMES, 10) == {"a": b"new", "b": b"new"}
    assert count == [4]


def test_reading_by_name_would_mix_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same swap between two reads by path gives half of each."""
    old, new = folder(tmp_path / "x", b"old"), folder(tmp_path / "y", b"new")
    interfere(monkeypatch, 1, lambda: exchange(old, new))
    assert [storage.read_regular(old / name, 10) for name in NAMES] == [b"old", b"new"]


def test_a_folder_that_is_emptied_after_the_swap_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = folder(tmp_path / "x", b"old"), folder(tmp_path / "y", b"new")
    swaps = iter([True])

    def swap() -> None:
        if next(swaps, False):
            assert exchange(old, new)
            storage.discard(new)

    interfere(monkeypatch, 1, swap)
    assert read_together(old, NAMES, 10) == {"a": b"new", "b": b"new"}


def test_a_folder_that_never_rests_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = folder(tmp_path / "x", b"old"), folder(tmp_path / "y", b"new")
    count = interfere(monkeypatch, 0, lambda: exchange(old, new))
    with pytest.raises(OSError, match="keep replacing"):
        read_together(old, NAMES, 10)
    assert count == [2 * storage._TRIES]


def test_without_open_folders_files_are_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path / "x", b"1")
    monkeypatch.setattr(os, "supports_dir_fd", set())
    assert read_together(path, ("a", "missing", "b"), 10) == {"a": b"1", "b": b"1"}
