"""An edit: what was asked, where it was written, the change itself and where it all came from.

An `Edit` is complete without a model: it can be loaded, looked at and published on any machine. Bound to an editor (by
`Editor.ablate`, `update` or `load`) it can also be reverted.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from diffedit.delta import Delta
from diffedit.errors import NotAppliedError, StorageError
from diffedit.io.card import model_card
from diffedit.io.files import delta_to_tensors, encode_edit, read_edit, tensors_to_delta
from diffedit.io.folder import write_folder
from diffedit.io.lora import kohya_file, peft_files
from diffedit.io.manifest import Manifest
from diffedit.request import Request

if TYPE_CHECKING:
    from diffedit.ledger import Ledger

logger = logging.getLogger("diffedit")

EDIT_FILE = "edit.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"


class Edit:
    """One edit; see the module's text.

    Args:
        manifest: everything about it but the numbers.
        delta: the change, float32 factors.
    """

    def __init__(self, manifest: Manifest, delta: Delta) -> None:
        self.manifest = manifest
        self.delta = delta
        self._ledger: Ledger | None = None

    @property
    def id(self) -> str:
        """SHA-256 over requests, settings, base, results and tensors: the same edit has the same id anywhere."""
        return self.manifest.edit_id

    @property
    def requests(self) -> tuple[Request, ...]:
        """What was asked, with every target filled in."""
        return self.manifest.requests

    @property
    def applied(self) -> bool:
        """Whether the edit is in the model of the editor that made or loaded it."""
        return self._ledger is not None and self.id in self._ledger.active

    def bind(self, ledger: Ledger) -> None:
        """Tie the edit to the ledger of the model it is in; editors call this."""
        self._ledger = ledger

    def revert(self) -> None:
        """Take the edit out of the model; other edits stay, and with none left the weights are the original bits.

        Raises:
            NotAppliedError: it is in no model.
            ForeignChangeError: something else changed the weights since.
        """
        if self._ledger is None:
            raise NotAppliedError("the edit is in no model", hint="apply it with editor.load(edit)")
        self._ledger.revert(self.id)

    def save(self, path: str | Path | None = None, *, overwrite: bool = False) -> Path:
        """Write the edit as one folder that diffedit, diffusers, PEFT, ComfyUI and A1111 read.

        Args:
            path: the folder; default `./<action>-<subjects>`.
            overwrite: replace an edit folder that is already there.

        Returns:
            The folder.

        Raises:
            OutputExistsError: something is there and `overwrite` is false, or it is not an edit folder.
            StorageError: the file system refused; nothing is left behind.
        """
        folder = Path(os.path.expanduser(self.manifest.slug() if path is None else path))
        saved = write_folder(folder, self.files(), overwrite=overwrite)
        logger.info("saved %s to %s", self, saved)
        return saved

    def files(self) -> dict[str, bytes]:
        """The folder's files in memory, by name; the same edit gives the same bytes."""
        out = {
            EDIT_FILE: encode_edit(self.manifest, delta_to_tensors(self.delta)),
            LORA_FILE: kohya_file(self.delta, self.manifest),
            **peft_files(self.delta, self.manifest),
        }
        sizes = {name: len(data) for name, data in out.items()}
        return {**out, "README.md": model_card(self.manifest, sizes).encode("utf-8")}

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read an edit from its folder (or its `edit.safetensors`) without any model; every byte is checked.

        Raises:
            MalformedArtifactError, IntegrityError, UnsupportedVersionError, UnsafeFormatError, StorageError.
        """
        if not isinstance(path, str | os.PathLike):
            raise StorageError("an edit is loaded from a path", value=type(path).__name__, hint="name its folder")
        manifest, tensors = read_edit(Path(os.path.expanduser(path)))
        return cls(manifest, tensors_to_delta(manifest, tensors))

    def summary(self) -> str:
        """A few lines for a person: what became what, where, how large."""
        lines = [
            f"{request.action} {request.subject!r} -> {request.target!r} ({reason})"
            for request, reason in zip(self.requests, self.manifest.target_reasons, strict=True)
        ]
        lines += [
            f"  {site.component}.{site.path}: rank {site.rank}, relative norm {site.relative_norm:.3f}, "
            f"{site.achieved:.1%} of the change kept in {site.dtype}"
            for site in self.manifest.sites
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        subjects = ", ".join(f"{request.subject!r} -> {request.target!r}" for request in self.requests)
        return f"Edit({self.requests[0].action} {subjects}, id={self.id[:12]})"
