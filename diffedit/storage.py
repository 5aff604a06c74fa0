"""What a crash-safe write is made of: temporary names, durable bytes, an atomic swap, a sweep after dead writers.

Temporary names are `.diffedit-<pid>-<host><random>.tmp`, in the folder of the destination so that the last step is a
rename. The host part keeps a shared file system safe: only temporaries of dead processes of this very host are swept.
All of it works through `os`, so that tests can make every single call fail.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from diffedit.errors import StorageError

_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_TEMPORARY = re.compile(r"\.diffedit-(\d{1,10})-([0-9a-f]{8})[0-9a-f]{16}\.tmp")
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_TRIES = 64
_HINTS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder that can be written to",
    errno.EPERM: "choose a folder that can be written to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of the path is a file; choose another path",
    errno.ELOOP: "a part of the path is a symbolic link to itself; choose another path",
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `StorageError` about `path`."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        number = error.errno if isinstance(error, OSError) else None
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StorageError(
            "the file system refused",
            value=ascii(str(path))[:300],
            cause=reason,
            hint=_HINTS.get(number or 0, "choose another path"),
        ) from error


def temporary_path(parent: Path) -> Path:
    """A fresh name for a temporary file or folder in `parent`."""
    return parent / f".diffedit-{os.getpid()}-{_HOST}{secrets.token_hex(8)}.tmp"


def sweep(parent: Path) -> None:
    """Remove the temporaries that dead processes of this host left in `parent`; what cannot be removed stays."""
    if os.name != "posix":  # os.kill(pid, 0) asks on POSIX and kills on Windows
        return
    with suppress(OSError):
        for name in os.listdir(parent):
            match = _TEMPORARY.fullmatch(name)
            if match and match[2] == _HOST and not _alive(int(match[1])):
                discard(parent / name)


def discard(path: Path) -> None:
    """Remove a file or a whole folder, as far as the file system allows."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(path)


def write_durable(path: Path, data: bytes) -> None:
    """Create a new file, write it whole, and wait until the disk has it. Its mode follows the umask."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Wait until the disk has the folder's entries (POSIX only: elsewhere a folder cannot be opened)."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Swap two existing paths in one step. `False` where the system cannot: only Linux can, on most file systems.

    Raises:
        OSError: the system can, and refused.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(first))


def read_regular(path: Path | str, limit: int, *, folder: int | None = None) -> bytes:
    """At most `limit` bytes of a regular file; never blocks on a named pipe.

    `stat` comes first, since opening a device may act on it; `fstat` on what was opened decides.

    Args:
        path: the file.
        limit: in bytes.
        folder: descriptor of an open folder that a relative `path` is looked up in.

    Raises:
        OSError: not a regular file, or the system refused.
    """
    if not stat.S_ISREG(os.stat(path, dir_fd=folder).st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags, dir_fd=folder), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return file.read(limit)


def read_together(folder: Path, names: Sequence[str], limit: int) -> dict[str, bytes]:
    """Files of one folder, all as one save left them; those that are not there are left out.

    A save swaps whole folders, so names that are looked up one after the other could belong to two of them. Here the
    folder is opened once, the names are looked up in what was opened, and that must still be the folder of this name
    afterwards: a folder that was swapped out is being removed. Where the system cannot look up names in an open
    folder, as on Windows, the files are read one by one.

    Args:
        folder: the folder.
        names: of the files.
        limit: most bytes of one file.

    Raises:
        OSError: no such folder, a file is not a regular one, or the system refused.
    """
    if os.open not in os.supports_dir_fd:
        return _read_those(folder, names, limit, None)
    for _ in range(_TRIES):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = _read_those(None, names, limit, descriptor)
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return found
        finally:
            os.close(descriptor)
    raise OSError(errno.EBUSY, "other programs keep replacing the folder", str(folder))


def _read_those(folder: Path | None, names: Sequence[str], limit: int, descriptor: int | None) -> dict[str, bytes]:
    found = {}
    for name in names:
        with suppress(FileNotFoundError):
            found[name] = read_regular(name if folder is None else folder / name, limit, folder=descriptor)
    return found


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
