"""An edit: what was asked, where it was written, the change itself and where it all came from.

An `Edit` is complete without a model: it can be loaded, looked at and published on any machine. Bound to an editor (by
`Editor.ablate`, `update` or `load`) it can also be reverted.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffedit import algebra
from diffedit.algebra import Conflict
from diffedit.delta import Delta
from diffedit.errors import NotAppliedError, RequestError, StorageError
from diffedit.io.adapters import Exported, Layout, export_adapters
from diffedit.io.edit_folder import edit_files, read_folder
from diffedit.io.folder import write_folder
from diffedit.io.hub import pull
from diffedit.io.hub_calls import Patience
from diffedit.io.hub_push import Pushed, push
from diffedit.io.manifest import Manifest
from diffedit.io.measured import Measured
from diffedit.io.names import hub_id
from diffedit.request import Request
from diffedit.summary import summary

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
        measured: what was measured about it, if anything was.

    Attributes:
        measured: saved and pushed with it and shown in its card, but no part of its identity; `record` sets it.
        notes: what was noted while it was made, such as names that were not edited with a subject; not saved.
        origin: where on the Hub it was pulled from or pushed to last, "user/name@commit"; no part of its identity.
    """

    def __init__(
        self, manifest: Manifest, delta: Delta, measured: Measured | None = None, notes: tuple[str, ...] = ()
    ) -> None:
        self.manifest = manifest
        self.delta = delta
        self.notes = notes
        self.origin: str | None = None
        self.measured = measured
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

    def copy(self) -> Edit:
        """The same edit, in no model."""
        other = Edit(self.manifest, self.delta, self.measured)
        other.notes, other.origin = self.notes, self.origin
        return other

    def record(self, measured: Measured | None) -> None:
        """Keep what was measured about the edit, in place of what was known; `None` forgets it.

        Args:
            measured: such as `Evaluation.measured()` of an evaluation of this edit.

        Raises:
            RequestError: it is about another edit: one that was composed or scaled since is not the one measured.
        """
        if measured is not None and measured.edit_id != self.id:
            raise RequestError(
                "the measurements are about another edit", value=measured.edit_id[:12], hint="measure this one"
            )
        self.measured = measured

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

    def export(self, path: str | Path, *, dtype: torch.dtype = torch.float32, layout: Layout = "kohya") -> Exported:
        """Write the adapters alone (kohya's and PEFT's) as a new folder, or one LoRA as a `.safetensors` file.

        Args:
            path: what to make; it must not be there yet.
            dtype: float32, float16 or bfloat16; the result and the card say what the rounding costs.
            layout: of a `.safetensors` file: "kohya", which all programs read, or "diffusers".

        Raises:
            SwallowedError, NonFiniteError: `dtype` cannot hold the change.
            OutputExistsError, StorageError: see `save`.
        """
        return export_adapters(self.delta, self.manifest, Path(os.path.expanduser(path)), dtype, layout)

    def files(self) -> dict[str, bytes]:
        """The folder's files in memory, by name; the same edit with the same measurements gives the same bytes."""
        return edit_files(self.manifest, self.delta, self.measured)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read an edit from its folder (or its `edit.safetensors`) without any model; every byte is checked.

        Raises:
            ArtifactError: it is damaged, foreign, or cannot be read.
        """
        if not isinstance(path, str | os.PathLike):
            raise StorageError("an edit is loaded from a path", value=type(path).__name__, hint="name its folder")
        return cls(*read_folder(Path(os.path.expanduser(path))))

    @classmethod
    def from_pretrained(
        cls,
        repo_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        deadline: float = 120.0,
    ) -> Edit:
        """Load an edit from a folder or from the Hub; every byte is checked.

        Args:
            repo_or_path: a path that exists, else "user/name" or "user/name@commit" on the Hub.
            revision: branch, tag or commit; default: the main branch. `origin` says which commit it was.
            token: default: that of huggingface_hub.
            cache_dir: default: that of huggingface_hub.
            local_files_only: take what the cache holds, as `HF_HUB_OFFLINE=1` does.
            deadline: seconds that the Hub may take.

        Raises:
            HubError, ArtifactError: it cannot be had, or is not an edit, or damaged.
        """
        if not isinstance(repo_or_path, str | os.PathLike):
            return cls.load(repo_or_path)  # which says what it takes
        if os.path.exists(os.path.expanduser(repo_or_path)):
            if revision is not None:
                raise RequestError("a folder has no revisions", value=revision, hint="leave revision out")
            return cls.load(repo_or_path)
        if hub_id(str(repo_or_path).partition("@")[0]) is None:
            return cls.load(repo_or_path)  # which says that there is no such folder
        pulled = pull(
            str(repo_or_path),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            patience=Patience(deadline),
        )
        edit = cls.load(pulled.folder)
        edit.origin = pulled.origin
        return edit

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
        deadline: float = 120.0,
    ) -> Pushed:
        """Bring the edit to the Hub as one commit; where the Hub has it already, nothing is sent.

        Args:
            repo_id: "user/name"; made if it is missing.
            private: make it private, and refuse one that is public; if false make it public, or use it as it is.
            revision: branch to push to, made if it is missing; default: the main branch.
            create_pr: open a pull request instead of committing.
            token: default: that of huggingface_hub.
            deadline: seconds that the Hub may take.

        Raises:
            HubError: it is not on the Hub, or that is not known. Pushing again never commits twice.
        """
        pushed = push(
            self.files(),
            repo_id,
            title=f"{self.manifest.slug()} ({self.id[:12]})",
            private=private,
            revision=revision,
            create_pr=create_pr,
            token=token,
            patience=Patience(deadline),
        )
        self.origin = f"{pushed.repo_id}@{pushed.commit}"
        return pushed

    def without(self, *subjects: str) -> Edit:
        """The edit that would have been made without these subjects; exact, and needs no model.

        Raises:
            RequestError: it has no such subject, or nothing would be left.
            NotComposableError: the edit has no pairs.
        """
        return Edit(*algebra.without((self.manifest, self.delta), subjects))

    def __mul__(self, factor: float) -> Edit:
        """The edit made stronger or weaker: 0.5 is half of it, -1 its opposite."""
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        return Edit(*algebra.scale((self.manifest, self.delta), float(factor)))

    __rmul__ = __mul__

    def conflicts(self, other: Edit, *, threshold: float = 0.1) -> tuple[Conflict, ...]:
        """How two edits would get into each other's way in one model, worst first; empty if they do not.

        Args:
            other: made for the same base.
            threshold: least interference to report: |D k| / |r|, one edit's effect on the other's keys.

        Raises:
            BaseMismatchError: they were made for different models.
        """
        return algebra.conflicts((self.manifest, self.delta), (other.manifest, other.delta), threshold)

    def summary(self) -> str:
        """A few lines for a person: what became what, other names and where they come from, where, how large."""
        return summary(self.manifest)

    def __repr__(self) -> str:
        subjects = ", ".join(f"{request.subject!r} -> {request.target!r}" for request in self.requests)
        return f"Edit({self.requests[0].action} {subjects}, id={self.id[:12]})"


def compose(edits: Sequence[Edit]) -> Edit:
    """One edit that does what all of them ask, as if they had been solved together; exact, and needs no model.

    The order does not matter. Adding the changes instead, as applying several edits to one model does, lets each
    disturb the others a little.

    Args:
        edits: made for the same base, at the same sites, by the same updater and settings.

    Raises:
        RequestError: no edits, or a subject in two of them.
        BaseMismatchError: they were made for different models.
        NotComposableError: they have no common solve, or one came without its pairs.
        ContradictionError: they ask one key for different values.
    """
    if isinstance(edits, Edit) or not all(isinstance(edit, Edit) for edit in edits):
        raise RequestError("compose takes a list of edits", value=type(edits).__name__, hint="write compose([a, b])")
    return Edit(*algebra.compose([(edit.manifest, edit.delta) for edit in edits]))
