"""A single-file checkpoint with edits in it: a new file in which only the edited tensors' bytes differ.

Header, metadata, order, VAE, everything else is copied as it is, in one pass with bounded memory, forced to the disk
and put into place at the end. The input is never written to. A site that the file does not hold is an error, never a
no-op; so is a UNet edit of a file that carries a second, averaged copy of the UNet, since some loaders take that one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffedit.backends.deferred import unread
from diffedit.backends.ldm import EMA_PREFIX, checkpoint_names
from diffedit.backends.publish import new_file
from diffedit.backends.tensorfile import TensorFile, copy_patched, in_file_dtype, open_tensors, same_values
from diffedit.backends.unet import UNET
from diffedit.errors import (
    NoOpError,
    OutputExistsError,
    StorageError,
    UnsafeFormatError,
    UnsupportedModelError,
)
from diffedit.interfaces import Backend
from diffedit.site import EditSite, Role

SUFFIX = ".safetensors"


def save_checkpoint(
    backend: Backend, source: Path, path: Path, *, sites: Sequence[EditSite] | None = None
) -> dict[str, EditSite]:
    """Write a copy of a checkpoint file that holds the backend's live weights at some sites.

    Args:
        backend: the edited model; it was loaded from `source`.
        source: a `.safetensors` checkpoint in the original layout.
        path: the file to make, not there yet.
        sites: which weights to carry over; default: every edit site whose live weight is not the file's.

    Returns:
        Name in the file -> site, for every tensor with new values.

    Raises:
        UnsafeFormatError: not a `.safetensors` file.
        UnsupportedModelError: the file holds no such layer, or an averaged copy of an edited UNet.
        NoOpError: no weight differs from the file's.
        SwallowedError: the file's dtype cannot hold the edit.
        OutputExistsError: something is at `path`.
        StorageError: the file system refused; nothing is left behind.
    """
    source, path = Path(os.path.abspath(source)), Path(os.path.abspath(path))
    for file in (source, path):
        if file.suffix.lower() != SUFFIX:
            raise UnsafeFormatError(
                f"single-file checkpoints are read and written as {SUFFIX} only", value=ascii(file.name)
            )
    if os.path.lexists(path):
        same = os.path.exists(path) and os.path.exists(source) and os.path.samefile(source, path)
        raise OutputExistsError(
            "the output is the input" if same else "the output is already there",
            value=ascii(str(path)),
            hint="a checkpoint is patched into a new file; choose another path",
        )
    checkpoint, new, named = patches(backend, source, sites)
    if not new:
        raise NoOpError("the model's weights are those of the file", value=source.name, hint="apply an edit first")
    with new_file(path) as temporary:
        copy_patched(checkpoint, temporary, new)
    return {name: named[name] for name in sorted(new)}


def patches(
    backend: Backend, source: Path, sites: Sequence[EditSite] | None = None
) -> tuple[TensorFile, dict[str, Tensor], dict[str, EditSite]]:
    """What `save_checkpoint` would change in a file.

    Arguments and errors are those of `save_checkpoint`.

    Returns:
        The file, the new values in its dtype by name, and the names of all the sites.
    """
    try:
        checkpoint = open_tensors(source)
    except OSError as error:
        raise StorageError("the checkpoint cannot be read", value=ascii(str(source)), cause=error.strerror) from error
    named = _named(backend, checkpoint, sites)
    new: dict[str, Tensor] = {}
    for name, site in named.items():
        stored = checkpoint.read(name)  # one at a time: all sites together are a third of the UNet
        if not same_values(backend.weight(site), stored):
            new[name] = in_file_dtype(name, backend.weight(site), stored)
    averaged = [name for name in new if named[name].component == UNET]
    if averaged and any(name.startswith(EMA_PREFIX) for name in checkpoint.entries):
        raise UnsupportedModelError(
            "the checkpoint holds a second, averaged copy of its UNet",
            value=source.name,
            cause="programs that prefer that copy would not see the edit",
            hint="use the checkpoint's EMA-only version",
        )
    return checkpoint, new, named


def _named(backend: Backend, checkpoint: TensorFile, sites: Sequence[EditSite] | None) -> dict[str, EditSite]:
    """Where the sites are in the file."""
    whole = unread(backend.model.pipeline) is None
    chosen = (backend.sites(*Role) if whole else backend.sites()) if sites is None else sites  # unread is unedited
    layers: Any = 2
    if any(site.component == UNET for site in chosen):
        config: Any = getattr(getattr(backend.model.pipeline, UNET, None), "config", {})
        layers = config.get("layers_per_block", 2)
    if not isinstance(layers, int):
        raise UnsupportedModelError("the UNet's blocks differ in size", value=f"layers_per_block {layers}")
    named = {}
    for site in chosen:
        candidates = checkpoint_names(site, layers)
        found = [name for name in candidates if name in checkpoint.entries]
        if len(found) != 1:
            raise UnsupportedModelError(
                "the checkpoint does not hold the layer" if not found else "the checkpoint holds the layer twice",
                value=f"{site.name} in {checkpoint.path.name}",
                cause=f"looked for {', '.join(candidates)}",
                hint="name the file that the model was loaded from",
            )
        named[found[0]] = site
    return named
