"""One error tree. Every error that diffedit raises on purpose is a `DiffEditError`.

A message has four parts, in this order: the case, the value that was seen, the likely cause, the next step. Codes
(`DE-101`, ...) are stable: pipelines may match on them, and `docs/errors.md` lists each with its cure. `exit_code`
is what the command line returns: 2 when the input has to change, 1 when the work itself failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class DiffEditError(Exception):
    """Base of the tree.

    Args:
        case: what went wrong, in one sentence without a full stop.
        value: the value that was seen, shortened and quoted by the caller if it is text.
        cause: why this usually happens.
        hint: the next step, an imperative.
    """

    code: ClassVar[str] = "DE-000"
    exit_code: ClassVar[int] = 2

    def __init__(self, case: str, *, value: object = None, cause: str | None = None, hint: str | None = None) -> None:
        self.case = case
        self.value = value
        self.cause = cause
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [self.case if self.value is None else f"{self.case}: {self.value}"]
        parts += [part[0].upper() + part[1:] for part in (self.cause, self.hint) if part]
        text = ". ".join(part.rstrip(".") for part in parts)
        return f"[{self.code}] {text}" + ("" if text.endswith("?") else ".")


class RequestError(DiffEditError):
    """The request itself cannot be understood (a template without "{}", a target equal to the subject, ...)."""

    code = "DE-100"


class EmptySubjectError(RequestError):
    """The subject, target or preserve entry is empty or blank."""

    code = "DE-101"


class SubjectNotFoundError(RequestError):
    """The subject does not stand in the prompt as whole words, or stands there more than once."""

    code = "DE-102"


class SubjectTruncatedError(RequestError):
    """The subject lies beyond the tokens that the text encoder reads (77 in Stable Diffusion)."""

    code = "DE-103"


class ContradictionError(RequestError):
    """Two parts of a request ask the same key for different values."""

    code = "DE-104"


class NotComposableError(RequestError):
    """Edits that have no common solve: of different bases, sites, methods or settings, or without their pairs."""

    code = "DE-105"


class UnknownNameError(DiffEditError):
    """No backend, locator, updater, scorer or built-in model has that name."""

    code = "DE-200"


class ModelNotFoundError(DiffEditError):
    """The model is neither a pipeline, a folder, a checkpoint file, a built-in name nor a reachable Hub id."""

    code = "DE-201"


class UnsupportedModelError(DiffEditError):
    """No backend, or more than one, accepts the model; or a site or component does not exist in it."""

    code = "DE-202"


class UnsafeFormatError(DiffEditError):
    """A pickle-based checkpoint: loading it may run code, so diffedit never opens it."""

    code = "DE-203"


class UnsupportedTensorError(DiffEditError):
    """A weight that cannot be edited as it is: meta, quantised, wrapped by an adapter, or of a wrong shape."""

    code = "DE-204"


class NumericalError(DiffEditError):
    """The solve or the cast to the model's dtype gives no usable weights."""

    code = "DE-300"
    exit_code = 1


class NonFiniteError(NumericalError):
    """NaN or infinity in weights, activations or a delta."""

    code = "DE-301"


class NoOpError(NumericalError):
    """The edit would change nothing: the values asked for are those that the model already gives."""

    code = "DE-302"


class SwallowedError(NumericalError):
    """Too little of the change survives the rounding to the model's dtype."""

    code = "DE-303"


class IllConditionedError(NumericalError):
    """The regularised keys are too close to singular for the digits of float64."""

    code = "DE-304"


class NoCausalSiteError(NumericalError):
    """The trace names no site: the corruption left the concept in place, or no state brings it back for certain."""

    code = "DE-305"


class HistoryError(DiffEditError):
    """Base of what the ledger refuses."""

    code = "DE-400"
    exit_code = 1


class AlreadyAppliedError(HistoryError):
    """The edit is in the model already."""

    code = "DE-401"


class NotAppliedError(HistoryError):
    """The edit is not in the model, so it cannot be reverted."""

    code = "DE-402"


class ForeignChangeError(HistoryError):
    """The weights are not those that the ledger wrote: something else changed them."""

    code = "DE-403"


class ModelBusyError(HistoryError):
    """Another thread is writing to the same model."""

    code = "DE-404"


class ArtifactError(DiffEditError):
    """Base of what is wrong with a file or folder."""

    code = "DE-500"
    exit_code = 1


class MalformedArtifactError(ArtifactError):
    """The file is not a complete edit: truncated, wrong header, names or shapes that do not belong."""

    code = "DE-501"


class IntegrityError(ArtifactError):
    """The content differs from its SHA-256: a changed byte, on purpose or not."""

    code = "DE-502"


class UnsupportedVersionError(ArtifactError):
    """The file was written by a later major version of the format."""

    code = "DE-503"


class OutputExistsError(ArtifactError):
    """The output is already there; diffedit never overwrites silently."""

    code = "DE-504"
    exit_code = 2


class StorageError(ArtifactError):
    """The file system refused: no space, no permission, read-only, a name too long."""

    code = "DE-505"


class BaseMismatchError(DiffEditError):
    """The edit was made for another base model."""

    code = "DE-600"
    exit_code = 1


class HubError(DiffEditError):
    """Base of what goes wrong between here and the Hub."""

    code = "DE-700"
    exit_code = 1


class HubAccessError(HubError):
    """The Hub does not let this token in: missing, wrong, expired, without permission, or the repository is gated."""

    code = "DE-701"
    exit_code = 2


class HubNotFoundError(HubError):
    """No such repository, no such revision, or no edit in it."""

    code = "DE-702"
    exit_code = 2


class HubConflictError(HubError):
    """The repository changed meanwhile, or a tag names another commit than before."""

    code = "DE-703"


class HubRefusedError(HubError):
    """The Hub understood the request and refuses it: too large, invalid, a branch that cannot be pushed to."""

    code = "DE-704"


class HubUnavailableError(HubError):
    """The Hub failed, limits the rate, cannot be reached, or did not answer before the deadline."""

    code = "DE-705"


class HubOfflineError(HubError):
    """The network is switched off, and the local cache does not hold what was asked for."""

    code = "DE-706"


class HubVisibilityError(HubError):
    """The repository is public and a private push was asked for."""

    code = "DE-707"
    exit_code = 2


def nearest(name: str, known: Iterable[str]) -> str:
    """The sentence that ends an "unknown name" error: the closest known name, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    return "Known: " + (", ".join(names) if names else "none")
