"""What may be written where: portable names only, and nobody's files but an edit's own are ever overwritten."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from diffedit.errors import OutputExistsError, StorageError
from diffedit.io.files import EDIT_FILE

# What diffedit writes into an edit's folder. `overwrite` removes these and the names it writes anew, and nothing else.
EDIT_FOLDER_FILES = frozenset(
    {
        EDIT_FILE,
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "before_after.png",
        "measured.json",
        "pairs.safetensors",
        "pytorch_lora_weights.safetensors",
        "text_encoder_2/adapter_config.json",
        "text_encoder_2/adapter_model.safetensors",
        "unet/adapter_config.json",
        "unet/adapter_model.safetensors",
    }
)

_REPLACE = "choose another path, or replace it with overwrite=True"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}(?<!\.)")
# What Windows takes for a device in any folder and with any ending.
_DEVICE = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_MAX_DEPTH = 4


def portable_tree(files: Mapping[str, bytes]) -> dict[PurePosixPath, bytes]:
    """The files by path; names must mean the same on every file system."""
    tree: dict[PurePosixPath, bytes] = {}
    folded: set[str] = set()
    for name, data in sorted(files.items()):
        parts = name.split("/")
        fits = len(parts) <= _MAX_DEPTH and all(_PART.fullmatch(p) and not _DEVICE.fullmatch(p) for p in parts)
        if not fits or name.casefold() in folded:
            raise StorageError(
                "a file name is not portable", value=ascii(name)[:300], hint="use letters, digits, _, - and ."
            )
        folded.add(name.casefold())
        tree[PurePosixPath(name)] = data
    if not tree:
        raise StorageError("there is nothing to write", hint="pass at least one file")
    return tree


def absolute(path: Path) -> Path:
    """The path without `..`, links left alone; its last part must be a name."""
    path = Path(path)
    if path.name in ("", ".."):
        raise StorageError(
            "the output needs a name", value=_show(path), hint="name a folder or file that is not there yet"
        )
    return Path(os.path.abspath(path))


def check_folder(path: Path, tree: Mapping[PurePosixPath, bytes], overwrite: bool) -> bool:
    """Whether a folder is there that may be overwritten; raises if what is there may not."""
    _refuse_link(path)
    if not os.path.lexists(path):
        return False
    if not path.is_dir():
        raise exists_error(path, "the output is there already and is no folder")
    if not os.listdir(path):
        return False
    if not overwrite:
        raise exists_error(path, "the output folder is there already", _REPLACE)
    if not (path / EDIT_FILE).is_file():
        raise exists_error(path, f"the folder is no edit (it holds no {EDIT_FILE}), so it is not overwritten")
    known = EDIT_FOLDER_FILES | {str(name) for name in tree}
    foreign = sorted(name for name in _listing(path) if name not in known)
    if foreign:
        raise exists_error(path / foreign[0], "the folder holds other things than an edit, so it is not overwritten")
    return True


def check_file(path: Path, overwrite: bool) -> None:
    """Raise if what is there may not be overwritten."""
    _refuse_link(path)
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise exists_error(path, "the output is there already and is no regular file")
    if not overwrite:
        raise exists_error(path, "the output file is there already", _REPLACE)


def exists_error(path: Path, case: str, hint: str = "choose another path") -> OutputExistsError:
    """The error for an output that stays."""
    return OutputExistsError(case, value=_show(path), hint=hint)


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise StorageError("the output is a symbolic link", value=_show(path), hint="name the place that it points to")


def _listing(path: Path) -> list[str]:
    """Relative names of everything in a folder that is no plain subfolder."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for root, folders, names in os.walk(path, onerror=fail):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        found += [(Path(root) / name).relative_to(path).as_posix() for name in [*names, *links]]
    return found


def _show(path: Path) -> str:
    return ascii(str(path))[:300]
