"""New folders and files for whole models: complete, or not there.

Everything is written under a temporary name beside the destination, forced to the disk, then renamed into place, and
then the parent folder is forced to the disk. An error leaves nothing behind; after a power cut or `kill -9` the
temporary remains until the next write into the same parent sweeps it.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffedit.errors import OutputExistsError, StorageError
from diffedit.storage import discard, sweep, sync_folder, temporary_path


@contextmanager
def new_folder(path: Path, *, replaceable: str | None = None) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `path` when the block ends without an error.

    Args:
        path: absolute path of the folder to make; an empty folder may be there.
        replaceable: replace a folder that holds a file of this name; it stays, whole, until the new one is in place.

    Raises:
        OutputExistsError: something is there that may not be replaced.
        StorageError: the file system refused; what was there is there still.
    """
    with _storage(path):
        occupied = _check_folder(path, replaceable)
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        temporary = temporary_path(path.parent)
        try:
            os.mkdir(temporary)
            yield temporary
            _sync_tree(temporary)
            if occupied:
                _swap(temporary, path)
            else:
                _place(temporary, path)
        finally:
            discard(temporary)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A free temporary name to write one file to; it becomes `path` when the block ends without an error.

    Raises:
        OutputExistsError: something is there already.
        StorageError: the file system refused.
    """
    with _storage(path):
        if os.path.lexists(path):
            raise _exists(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        temporary = temporary_path(path.parent)
        try:
            yield temporary
            _sync(temporary)
            try:
                os.link(temporary, path)  # unlike a rename it fails if another writer was faster
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise
                os.rename(temporary, path)  # a file system without hard links
            try:
                sync_folder(path.parent)
            except BaseException:
                discard(path)
                raise
        finally:
            discard(temporary)


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise StorageError(
            "the model cannot be written",
            value=ascii(str(path))[:300],
            cause=error.strerror or str(error),
            hint="check space and permissions",
        ) from error


def _check_folder(path: Path, replaceable: str | None) -> bool:
    if not os.path.lexists(path):
        return False
    if path.is_symlink() or not path.is_dir():
        raise _exists(path)
    if not os.listdir(path):
        return False
    if replaceable is None:
        raise _exists(path, "choose another path, or allow overwriting")
    if not (path / replaceable).is_file():
        raise _exists(path)
    return True


def _place(temporary: Path, path: Path) -> None:
    was_empty = path.is_dir()
    try:
        if os.name != "posix" and was_empty:
            os.rmdir(path)
        os.rename(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise _exists(path) from error
        raise
    try:
        sync_folder(path.parent)
    except BaseException:
        os.rename(path, temporary)
        if was_empty:
            os.mkdir(path)
        raise


def _swap(temporary: Path, path: Path) -> None:
    """The old folder steps aside under a name of its own, where a crash at that moment leaves it, whole."""
    old = path.with_name(f"{path.name}.old-{secrets.token_hex(4)}")
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(old, path)
        raise
    try:
        sync_folder(path.parent)
    except BaseException:
        os.rename(path, temporary)
        os.rename(old, path)
        raise
    discard(old)


def _exists(path: Path, hint: str = "choose another path") -> OutputExistsError:
    return OutputExistsError("the output is already there", value=ascii(str(path))[:300], hint=hint)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            _sync(Path(folder) / name)
        sync_folder(Path(folder))


def _sync(path: Path) -> None:
    """Wait until the disk has the file's bytes."""
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
