"""Folders and files appear whole or not at all: every failing system call, several writers.

Processes that are killed are in `tests/reliability/kills.py`.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffedit import storage
from diffedit.errors import OutputExistsError, StorageError
from diffedit.io import folder
from diffedit.io.files import EDIT_FILE
from diffedit.io.folder import write_file, write_folder
from tests.reliability.faults import Fault, Faults

OLD = {EDIT_FILE: b"old" * 100, "README.md": b"old card"}
NEW = {EDIT_FILE: b"new" * 200, "pytorch_lora_weights.safetensors": b"new lora", "unet/adapter_config.json": b"{}"}

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions, links and signals of POSIX")


def snapshot(root: Path) -> dict[str, Any]:
    """Everything below `root`: name to content, link target or `None` for a folder."""
    out: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        out[path.relative_to(root).as_posix()] = content
    return out


def holds(path: Path, files: dict[str, bytes]) -> bool:
    return {name: content for name, content in snapshot(path).items() if content is not None} == files


def test_a_new_folder(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "a" / "b" / "edit", NEW)
    assert path == tmp_path / "a" / "b" / "edit" and path.is_absolute()
    assert holds(path, NEW)
    assert list(snapshot(tmp_path)) == ["a", "a/b", "a/b/edit", *sorted(f"a/b/edit/{n}" for n in [*NEW, "unet"])]


def test_relative_paths_and_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edit").mkdir()
    assert write_folder(Path("edit"), NEW) == tmp_path / "edit"
    assert holds(tmp_path / "edit", NEW)


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "edit", OLD)
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    before = snapshot(path)
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        write_folder(path, NEW)
    for name in ("file", "pipe"):
        with pytest.raises(OutputExistsError, match="no folder"):
            write_folder(tmp_path / name, NEW, overwrite=True)
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        write_file(tmp_path / "file", b"y")
    for name in ("edit", "pipe"):
        with pytest.raises(OutputExistsError, match="no regular file"):
            write_file(tmp_path / name, b"y", overwrite=True)
    assert snapshot(path) == before and (tmp_path / "file").read_bytes() == b"x"
    assert sorted(os.listdir(tmp_path)) == ["edit", "file", "pipe"]


@pytest.mark.parametrize("can_swap", [True, False])
def test_overwrite(can_swap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_swap:
        monkeypatch.setattr(folder, "exchange", lambda first, second: False)
    path = write_folder(tmp_path / "edit", OLD)
    path.chmod(0o750)
    assert write_folder(path, NEW, overwrite=True) == path
    assert holds(path, NEW) and os.listdir(tmp_path) == ["edit"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    file = write_file(tmp_path / "card.html", b"old")
    file.chmod(0o640)
    write_file(file, b"new", overwrite=True)
    assert file.read_bytes() == b"new" and stat.S_IMODE(file.stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["card.html", "edit"]
    write_file(tmp_path / "fresh", b"new", overwrite=True)
    write_folder(tmp_path / "fresh-folder", NEW, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["card.html", "edit", "fresh", "fresh-folder"]


def test_the_swap_is_tested_for_real() -> None:
    """The control of the parametrisation above: on Linux the one-step swap is there."""
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux swaps")
    assert exchange_works()


def exchange_works() -> bool:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        for part in "ab":
            Path(name, part).write_text(part)
        return storage.exchange(Path(name, "a"), Path(name, "b")) and Path(name, "a").read_text() == "b"


@pytest.mark.parametrize("extra", ["holiday.jpg", "notes/todo.txt", "README.md/x", ".hidden"])
def test_other_peoples_files_are_never_deleted(extra: str, tmp_path: Path) -> None:
    """A folder that happens to hold an edit, like a download folder, is not the edit's folder."""
    path = tmp_path / "downloads"
    path.mkdir()
    (path / EDIT_FILE).write_bytes(b"edit")
    (path / extra).parent.mkdir(exist_ok=True)
    (path / extra).write_bytes(b"precious")
    before = snapshot(tmp_path)
    with pytest.raises(OutputExistsError, match="other things"):
        write_folder(path, NEW, overwrite=True)
    assert snapshot(tmp_path) == before


def test_a_folder_that_is_no_edit_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "documents"
    path.mkdir()
    (path / "README.md").write_bytes(b"precious")
    with pytest.raises(OutputExistsError, match=r"holds no edit\.safetensors"):
        write_folder(path, NEW, overwrite=True)
    (path / "README.md").unlink()
    (path / "link").symlink_to("/")
    (path / EDIT_FILE).write_bytes(b"")
    with pytest.raises(OutputExistsError, match="other things"):
        write_folder(path, NEW, overwrite=True)
    assert sorted(os.listdir(path)) == [EDIT_FILE, "link"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("target", ["edit", "nowhere", "file"])
def test_symbolic_links_are_not_followed(target: str, overwrite: bool, tmp_path: Path) -> None:
    write_folder(tmp_path / "edit", OLD)
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(target)
    before = snapshot(tmp_path)
    with pytest.raises(StorageError, match="symbolic link"):
        write_folder(tmp_path / "link", NEW, overwrite=overwrite)
    with pytest.raises(StorageError, match="symbolic link"):
        write_file(tmp_path / "link", b"y", overwrite=overwrite)
    assert snapshot(tmp_path) == before


def test_a_linked_parent_is_fine(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write_folder(tmp_path / "link" / "edit", NEW)
    assert holds(tmp_path / "real" / "edit", NEW)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o000])
def test_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        path = write_folder(tmp_path / "edit", NEW)
        file = write_file(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    for item in (path, path / "unet"):
        assert stat.S_IMODE(item.stat().st_mode) == 0o777 & ~umask
    for item in (path / EDIT_FILE, path / "unet" / "adapter_config.json", file):
        assert stat.S_IMODE(item.stat().st_mode) == 0o666 & ~umask


BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/../b",
    "a//b",
    "a\\b",
    "C:x",
    "a\0",
    ".hidden",
    "a.",
    "é",
    "a b",
    "x" * 201,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_not_portable(name: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="portable"):
        write_folder(tmp_path / "edit", {EDIT_FILE: b"", name: b""})
    assert not os.listdir(tmp_path)


def test_names_that_one_file_system_takes_for_the_same(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="portable"):
        write_folder(tmp_path / "edit", {"a.txt": b"", "A.TXT": b""})
    with pytest.raises(StorageError, match="nothing to write"):
        write_folder(tmp_path / "edit", {})
    with pytest.raises(StorageError):
        write_folder(tmp_path / "edit", {"a": b"", "a/b": b""})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("path", ["", ".", "..", "/", "a/..", "a\0b", "x" * 300, "\ud800", "file/x"])
def test_destinations_that_cannot_be(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"")
    for write in (lambda: write_folder(Path(path), NEW), lambda: write_file(Path(path), b"")):
        with pytest.raises(StorageError):
            write()
    assert os.listdir(tmp_path) == ["file"]


# --- every system call fails once -------------------------------------------------------------------------------------


def prepare(kind: str, root: Path) -> Callable[[], Path]:
    """The save to try in `root`; whatever it needs is made first."""
    if kind == "new folder":
        return lambda: write_folder(root / "edit", NEW)
    if kind == "new parents":
        return lambda: write_folder(root / "a" / "b" / "edit", NEW)
    if kind == "empty folder":
        (root / "edit").mkdir()
        return lambda: write_folder(root / "edit", NEW)
    if kind.startswith("overwrite"):
        write_folder(root / "edit", OLD)
        return lambda: write_folder(root / "edit", NEW, overwrite=True)
    if kind == "new file":
        return lambda: write_file(root / "file", b"new")
    write_file(root / "file", b"old")
    return lambda: write_file(root / "file", b"new", overwrite=True)


KINDS = ("new folder", "new parents", "empty folder", "overwrite", "overwrite without swap", "new file", "replace file")


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(*_: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("fail", [no_space, read_only, interrupt])
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_that_fails_leaves_the_old_state(kind: str, fail: Fault, tmp_path: Path) -> None:
    failures = 0
    for at in range(1, 200):
        root = tmp_path / str(at)
        root.mkdir()
        save = prepare(kind, root)
        before = snapshot(root)
        with pytest.MonkeyPatch.context() as monkeypatch:
            if kind == "overwrite without swap":
                monkeypatch.setattr(folder, "exchange", lambda first, second: False)
            faults = Faults(monkeypatch, at, fail)
            try:
                save()
            except (StorageError, KeyboardInterrupt) as error:
                failures += 1
                assert isinstance(error, KeyboardInterrupt if fail is interrupt else StorageError)
                if fail is no_space:
                    assert error.cause == os.strerror(errno.ENOSPC) and error.hint == "free some space"
                failed = True
            else:
                failed = False
        if faults.count < at:
            break
        after = snapshot(root)
        if failed:
            assert after == before, f"call {at}"
        else:  # a call that may fail: the sweep, or the removal of what was replaced
            assert not any(".diffedit" in name or ".old" in name for name in after), f"call {at}"
    else:
        pytest.fail("the save never ran to its end")
    assert failures >= 8 if "file" not in kind or kind == "empty folder" else failures >= 5


def test_an_undo_is_really_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the last fsync comes after the rename, so that a failure there finds the new folder in place."""
    seen: list[bool] = []

    def fail(path: Path) -> None:
        if path == tmp_path:
            seen.append((tmp_path / "edit" / EDIT_FILE).read_bytes() == NEW[EDIT_FILE])
            no_space()

    monkeypatch.setattr(folder, "sync_folder", fail)
    with pytest.raises(StorageError):
        write_folder(tmp_path / "edit", NEW)
    assert seen == [True] and not os.listdir(tmp_path)


def test_files_are_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def note(name: str) -> None:
        call = getattr(os, name)

        def noted(*args: Any, **keywords: Any) -> Any:
            log.append(name)
            return call(*args, **keywords)

        monkeypatch.setattr(os, name, noted)

    for name in ("write", "fsync", "rename"):
        note(name)
    write_folder(tmp_path / "edit", NEW)
    # three files, written and forced one by one; the folders unet and edit; the rename; the parent.
    assert log == ["write", "fsync"] * 3 + ["fsync", "fsync", "rename", "fsync"]


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    write_folder(tmp_path / "edit", NEW)
    monkeypatch.undo()
    assert holds(tmp_path / "edit", NEW)


def test_file_systems_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", refuse)
    write_file(tmp_path / "file", b"x")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"x"


# --- the sweep; tests/reliability/kills.py makes real litter by killing processes -------------------------------------


def test_the_sweep_spares_the_living_other_hosts_and_strangers(tmp_path: Path) -> None:
    ours = f"{storage._HOST}{'0' * 16}"
    keep = [
        f".diffedit-{os.getpid()}-{ours}.tmp",
        f".diffedit-{os.getppid()}-{ours}.tmp",
        f".diffedit-4194303-{'f' * 8}{'0' * 16}.tmp",
        ".diffedit-4194303.tmp",
        "diffedit-4194303-x.tmp",
    ]
    dead = [f".diffedit-4194303-{ours}.tmp", f".diffedit-9999999999-{storage._HOST}{'1' * 16}.tmp"]
    for name in keep:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / dead[0]).mkdir()
    (tmp_path / dead[0] / EDIT_FILE).write_bytes(b"")
    (tmp_path / dead[1]).write_bytes(b"")
    write_file(tmp_path / "file", b"x")
    assert sorted(os.listdir(tmp_path)) == sorted([*keep, "file"])


# --- several writers --------------------------------------------------------------------------------------------------


def test_many_writers_of_one_folder(tmp_path: Path) -> None:
    """Readers look through an open folder, so that what they see belongs to one save even while others swap it."""
    contents = [{EDIT_FILE: bytes([i]) * 5000, "README.md": bytes([i]) * 50} for i in range(4)]
    path = write_folder(tmp_path / "edit", contents[0])
    errors: list[BaseException] = []
    done = threading.Event()

    def write(content: dict[str, bytes]) -> None:
        try:
            for _ in range(25):
                write_folder(path, content, overwrite=True)
        except BaseException as error:
            errors.append(error)

    reads = 0

    def read() -> None:
        nonlocal reads
        while not done.is_set():
            try:
                data = (path / EDIT_FILE).read_bytes()
            except FileNotFoundError:
                continue  # the folder was swapped out and emptied between two steps of the look-up
            reads += 1
            if len(data) != 5000 or len(set(data)) != 1:
                errors.append(AssertionError("torn"))

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    reader = threading.Thread(target=read)
    for thread in (*threads, reader):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    reader.join()
    assert not errors and reads > 0
    assert any(holds(path, content) for content in contents)
    assert os.listdir(tmp_path) == ["edit"]


def test_only_one_of_many_writers_makes_a_new_output(tmp_path: Path) -> None:
    for write, name in ((write_folder, "edit"), (write_file, "file")):
        results: list[str] = []
        barrier = threading.Barrier(6)

        def work(i: int, write: Any = write, name: str = name, results: Any = results, barrier: Any = barrier) -> None:
            barrier.wait()
            try:
                write(tmp_path / name, {EDIT_FILE: bytes([i])} if write is write_folder else bytes([i]))
                results.append("written")
            except OutputExistsError:
                results.append("exists")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == ["exists"] * 5 + ["written"]
    assert sorted(os.listdir(tmp_path)) == ["edit", "file"]
