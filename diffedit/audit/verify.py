"""Whether an edit's folder is what it says, and, given a base, whether it does what it says.

    verify("no-dog", "builtin:emoji").ok

Without a base: every hash, the canonical form and the id of `edit.safetensors`; the pairs; that measurements are about
this edit; adapters that hold the same change; texts that are those that diffedit writes; nothing missing and nothing
more. With a base: the fingerprint of every edited weight, and that applying the edit to it gives, to the bit, the
weights whose hash was recorded. Nothing is written, neither to files nor to the model. Hashes find changes, not
forgers: sign the folder when that matters.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from diffedit.audit.adapters import TOLERANCE, kohya_difference, peft_difference
from diffedit.audit.base import check_against_base
from diffedit.audit.checks import Check, attempt, failed
from diffedit.delta import Delta
from diffedit.edit import Edit
from diffedit.errors import DiffEditError, IntegrityError, MalformedArtifactError, RequestError, StorageError
from diffedit.io.container import MAX_FILE
from diffedit.io.files import EDIT_FILE, decode_edit, read_bytes, tensors_to_delta
from diffedit.io.lora import KOHYA_FILE, PEFT_CONFIG, PEFT_FILE, PEFT_FOLDER
from diffedit.io.measured import MEASURED_FILE, Measured, decode_measured
from diffedit.io.pairs import PAIRS_FILE, decode_pairs
from diffedit.io.strict import loads
from diffedit.storage import read_regular

# What may lie beside an edit without being a part of it, and what it is. Nothing can be verified about these.
BESIDE = {"before_after.png": "the preview", ".gitattributes": "the Hub's own file"}


class Verification(BaseModel):
    """What was checked and what came of it.

    Attributes:
        folder: name of the folder.
        edit_id: the edit's id; `None` if the edit file cannot be read.
        base: name of the base that it was checked against, if one was given.
        checks: in the order in which they were made.
    """

    model_config = ConfigDict(frozen=True)

    folder: str
    edit_id: str | None
    base: str | None
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed. What was skipped or has changed is not vouched for: see `unverified`."""
        return all(check.outcome != "fail" for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.outcome == "fail")

    @property
    def unverified(self) -> tuple[Check, ...]:
        """The checks that were skipped, and the derived texts that have changed."""
        return tuple(check for check in self.checks if check.outcome in ("skipped", "changed"))

    def summary(self) -> str:
        """One line per check."""
        return "\n".join(f"{check.outcome:8} {check.name}: {check.detail}" for check in self.checks)


def verify(
    folder: str | Path,
    base: Any = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    config: str | None = None,
) -> Verification:
    """Check an edit's folder, and the edit against its base if one is given.

    Args:
        folder: the folder that an edit was saved to or pulled to.
        base: whatever names a model, or a pipeline; default: the checks of the base are skipped.
        revision: of a Hub id.
        token: Hub token.
        config: for a single-file base, see `Editor`.

    Returns:
        The outcome of every check; what is wrong with the folder is a failed check, not an error.

    Raises:
        RequestError: there is no such folder.
        DiffEditError: the base cannot be opened.
    """
    given: Any = folder
    place = Path(os.path.expanduser(given)) if isinstance(given, str | os.PathLike) else None
    if place is None or not os.path.isdir(place):
        raise RequestError(
            "there is no such folder", value=ascii(str(folder))[:300], hint="name the folder that an edit was saved to"
        )
    edit, checks = _read(place)
    name = None
    if edit is None:
        checks.append(Check(name="result", outcome="skipped", detail="the edit cannot be read"))
    else:
        checks += _files(place, edit)
        if base is None:
            checks.append(Check(name="base", outcome="skipped", detail="no base was given"))
            checks.append(Check(name="result", outcome="skipped", detail="no base was given"))
        else:
            name, more = check_against_base(edit, base, revision=revision, token=token, config=config)
            checks += more
    known = None if edit is None else edit.id
    return Verification(folder=place.resolve().name, edit_id=known, base=name, checks=tuple(checks))


def _read(folder: Path) -> tuple[Edit | None, list[Check]]:
    """The edit with what lies beside it, and the checks of these files."""
    try:
        file, data, beside = read_bytes(folder, (PAIRS_FILE, MEASURED_FILE))
        manifest, tensors = decode_edit(data, str(file))
        delta = tensors_to_delta(manifest, tensors)
    except DiffEditError as error:
        return None, [failed(EDIT_FILE, error)]
    detail = f"canonical form, {len(tensors)} tensor hashes, id {manifest.edit_id[:12]}"
    checks = [Check(name=EDIT_FILE, outcome="pass", detail=detail)]
    measured = None
    if manifest.pairs and PAIRS_FILE in beside:
        try:
            pairs = decode_pairs(beside[PAIRS_FILE], manifest, str(folder / PAIRS_FILE))
        except DiffEditError as error:
            checks.append(failed(PAIRS_FILE, error))
        else:
            count = sum(len(record.tensors) for record in manifest.pairs.values())
            checks.append(Check(name=PAIRS_FILE, outcome="pass", detail=f"canonical form, {count} tensor hashes"))
            delta = Delta(delta.factors, {}, pairs)
    if MEASURED_FILE in beside:
        try:
            measured = _measured(beside[MEASURED_FILE], manifest.edit_id)
        except DiffEditError as error:
            checks.append(failed(MEASURED_FILE, error))
        else:
            detail = (
                f"canonical form, {len(measured.metrics)} numbers about this edit; whether they are right is not known"
            )
            checks.append(Check(name=MEASURED_FILE, outcome="pass", detail=detail))
    return Edit(manifest, delta, measured), checks


def _measured(data: bytes, edit_id: str) -> Measured:
    measured = decode_measured(data, MEASURED_FILE)
    if measured.edit_id != edit_id:
        raise IntegrityError(f"{MEASURED_FILE} is about another edit", value=measured.edit_id[:12], hint="delete it")
    return measured


def _files(folder: Path, edit: Edit) -> list[Check]:
    """What lies in the folder against what the edit would write now."""
    try:
        wanted = edit.files()
        found = _listing(folder)
    except DiffEditError as error:
        return [failed("files", error)]
    except OSError as error:
        return [Check(name="files", outcome="fail", detail=f"the folder cannot be listed: {error.strerror}")]
    expected = {*wanted, *([PAIRS_FILE] if edit.manifest.pairs else []), *({MEASURED_FILE} & found)}
    missing, more = sorted(expected - found), sorted(found - expected - BESIDE.keys())
    words = [f"missing: {', '.join(missing)}"] if missing else []
    words += [f"not part of the edit: {', '.join(ascii(name) for name in more[:5])}"] if more else []
    beside = sorted(found & BESIDE.keys())
    words += [f"{name} is {BESIDE[name]}, not checked" for name in beside]
    checks = [
        Check(
            name="files",
            outcome="fail" if missing or more else "pass",
            detail="; ".join([f"{len(expected & found)} of {len(expected)} files", *words]),
        )
    ]
    present = [name for name in wanted if name in found and name not in (EDIT_FILE, PAIRS_FILE, MEASURED_FILE)]
    return [*checks, *(_derived(folder, name, edit, wanted) for name in present if not name.endswith(PEFT_CONFIG))]


def _derived(folder: Path, name: str, edit: Edit, wanted: Mapping[str, bytes]) -> Check:
    """One file that follows from the edit: adapters by what they do, texts by their bytes."""

    def work() -> Check:
        same = _bytes(folder / name) == wanted[name]
        if name == KOHYA_FILE:
            off, dtype = kohya_difference(folder / name, edit.delta, edit.manifest.base.backend)
        elif name.endswith(PEFT_FILE):
            component = next(part for part, prefix in PEFT_FOLDER.items() if name == prefix + PEFT_FILE)
            beside = name.removesuffix(PEFT_FILE) + PEFT_CONFIG
            config, expected = _object(_bytes(folder / beside), beside), _object(wanted[beside], beside)
            off, dtype = peft_difference(folder / name, edit.delta, component, config, expected)
        else:
            detail = "as this version writes it" if same else "not as this version writes it, so it is not vouched for"
            return Check(name=name, outcome="pass" if same else "changed", detail=detail)
        if not off <= TOLERANCE.get(dtype, 0.0):
            raise IntegrityError("the adapter holds another change than the edit", value=f"{off:.2g} of it differs")
        how = "" if same else "; written by another version or program"
        return Check(name=name, outcome="pass", detail=f"the same change, within {off:.1g} of it ({dtype}){how}")

    return attempt(name, work)


def _bytes(path: Path) -> bytes:
    try:
        return read_regular(path, MAX_FILE + 1)
    except OSError as error:
        raise StorageError("the file cannot be read", value=path.name, cause=error.strerror) from error


def _object(data: bytes, name: str) -> Mapping[str, Any]:
    try:
        document = loads(data.decode("utf-8"), name)
    except UnicodeDecodeError as error:
        raise MalformedArtifactError(f"{name} is no text") from error
    if not isinstance(document, dict):
        raise MalformedArtifactError(f"{name} is no JSON object", value=type(document).__name__)
    return document


def _listing(folder: Path) -> set[str]:
    """Everything in the folder that is no plain subfolder, by relative name."""

    def fail(error: OSError) -> None:
        raise error

    found = set()
    for root, folders, names in os.walk(folder, onerror=fail):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        found |= {(Path(root) / name).relative_to(folder).as_posix() for name in (*names, *links)}
    return found
