"""Write a folder or a file so that whoever looks, at any moment, sees all of the old or all of the new.

Everything is written under a temporary name beside the destination and forced to the disk, then renamed into place,
then the parent folder is forced to the disk too. If any step fails, what was there before is there again and nothing
is left behind; after a power cut or `kill -9` the temporary remains until the next save sweeps it.

An overwritten folder is swapped with the new one in a single step where Linux allows it. Elsewhere it is first renamed
to `<name>.old-<random>`, which a crash at that moment leaves there, whole. Only folders with nothing but an edit in
them are ever overwritten.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from diffedit.errors import OutputExistsError
from diffedit.io.destination import absolute, check_file, check_folder, exists_error, portable_tree
from diffedit.storage import (
    discard,
    exchange,
    storage_errors,
    sweep,
    sync_folder,
    temporary_path,
    write_durable,
)

_TRIES = 16


def write_folder(path: Path, files: Mapping[str, bytes], *, overwrite: bool = False) -> Path:
    """Write `files` as the folder `path`, all or nothing.

    Args:
        path: destination; missing parents are made, an empty folder there is filled.
        files: relative name ("edit.safetensors", "unet/adapter_config.json") to content.
        overwrite: replace a folder that holds an edit and nothing else.

    Returns:
        `path` as an absolute path.

    Raises:
        OutputExistsError: something is there already that may not be replaced.
        StorageError: the file system refused, the destination is a symbolic link, or a name is not portable.
    """
    path, tree = absolute(path), portable_tree(files)
    with storage_errors(path):
        fresh = _make_parents(path.parent)
        try:
            check_folder(path, tree, overwrite)
            sweep(path.parent)
            temporary = temporary_path(path.parent)
            try:
                _write_tree(temporary, tree, _mode(path))
                _publish_folder(temporary, path, tree, overwrite)
            finally:
                discard(temporary)
        except BaseException:
            _remove_empty(fresh)
            raise
    return path


def write_file(path: Path, data: bytes, *, overwrite: bool = False) -> Path:
    """Write one file, all or nothing; like `write_folder` otherwise. An overwritten file's mode is kept.

    Raises:
        OutputExistsError: something is there already and `overwrite` is off, or it is no regular file.
        StorageError: the file system refused, or the destination is a symbolic link.
    """
    path = absolute(path)
    with storage_errors(path):
        fresh = _make_parents(path.parent)
        try:
            check_file(path, overwrite)
            sweep(path.parent)
            temporary = temporary_path(path.parent)
            try:
                write_durable(temporary, data)
                mode = _mode(path)
                if mode is not None:
                    os.chmod(temporary, mode)
                _publish_file(temporary, path, overwrite)
            finally:
                discard(temporary)
        except BaseException:
            _remove_empty(fresh)
            raise
    return path


def _publish_folder(temporary: Path, path: Path, tree: Mapping[PurePosixPath, bytes], overwrite: bool) -> None:
    for _ in range(_TRIES):  # another writer may create or remove the destination between our look and our rename
        occupied = check_folder(path, tree, overwrite)
        with suppress(FileNotFoundError):
            if occupied:
                _place_over(temporary, path)
                return
            if _place_new(temporary, path):
                return
    raise OutputExistsError(
        "other writers keep changing the output", value=ascii(str(path))[:300], hint="choose another path"
    )


def _place_new(temporary: Path, path: Path) -> bool:
    """Rename to a free path or over an empty folder. `False` if another writer was faster."""
    was_empty = path.is_dir()
    if was_empty and os.name != "posix":
        os.rmdir(path)
    try:
        os.rename(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    try:
        sync_folder(path.parent)
    except BaseException:
        os.rename(path, temporary)
        if was_empty:
            os.mkdir(path)
        raise
    return True


def _place_over(temporary: Path, path: Path) -> None:
    """Swap with the folder that is there, and remove that (if it is now `temporary`, the caller does)."""
    swapped = exchange(temporary, path)
    old = temporary if swapped else path.with_name(f"{path.name}.old-{secrets.token_hex(4)}")
    if not swapped:
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(old, path)
            raise
    try:
        sync_folder(path.parent)
    except BaseException:
        if swapped:
            exchange(temporary, path)
        else:
            os.rename(path, temporary)
            os.rename(old, path)
        raise
    if not swapped:
        discard(old)


def _publish_file(temporary: Path, path: Path, overwrite: bool) -> None:
    """Put the file into place and force the parent to the disk; on failure what was there comes back.

    Without `overwrite` a hard link is made, which fails if the name is taken, whatever other writers do. Where the
    system cannot swap two files, an overwritten one cannot come back: then the new one, complete, stays.
    """
    check_file(path, overwrite)
    swapped = linked = False
    if overwrite and os.path.lexists(path):
        swapped = exchange(temporary, path)
        if not swapped:
            os.replace(temporary, path)
    else:
        linked = True
        try:
            os.link(temporary, path)
        except FileExistsError as error:
            raise exists_error(path, "there is a file already") from error
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            os.rename(temporary, path)  # no hard links here: what `check_file` saw has to do
    try:
        sync_folder(path.parent)
    except BaseException:
        if swapped:
            exchange(temporary, path)
        elif linked:
            os.unlink(path)
        raise


def _write_tree(temporary: Path, tree: Mapping[PurePosixPath, bytes], mode: int | None) -> None:
    folders = sorted({parent for name in tree for parent in name.parents if parent.parts}, key=lambda item: item.parts)
    os.mkdir(temporary)
    for folder in folders:
        os.mkdir(temporary / folder)
    for name, data in tree.items():
        write_durable(temporary / name, data)
    for folder in [*reversed(folders), PurePosixPath()]:
        sync_folder(temporary / folder)
    if mode is not None:
        os.chmod(temporary, mode)


def _mode(path: Path) -> int | None:
    """Permission bits of what is there, or `None`."""
    try:
        return stat.S_IMODE(os.stat(path, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return None


def _make_parents(parent: Path) -> list[Path]:
    """Make missing folders; returns those, outermost first."""
    missing: list[Path] = []
    while not os.path.lexists(parent) and parent != parent.parent:
        missing.append(parent)
        parent = parent.parent
    fresh: list[Path] = []
    try:
        for folder in reversed(missing):
            with suppress(FileExistsError):
                os.mkdir(folder)
                fresh.append(folder)
                sync_folder(folder.parent)
    except BaseException:
        _remove_empty(fresh)
        raise
    return fresh


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with suppress(OSError):
            os.rmdir(folder)
