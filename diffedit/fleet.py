"""The same edits for many checkpoints, one after the other, in bounded memory.

    outcomes = apply_to_models([edit], ["a.safetensors", "b.safetensors", "model-c"], "edited")

Each model is opened (its text encoder alone, for edits of the text encoder), edited, written as a copy of its own kind
and closed before the next. A copy appears whole or not at all. A copy that is there already is compared with what would
be written: the same is kept, so that an interrupted run is simply started again; an incomplete one is written again;
anything else is left alone and reported, unless overwriting is asked for.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from diffedit.backends.checkpoint import SUFFIX
from diffedit.backends.families import INDEX
from diffedit.backends.saved import saved_state
from diffedit.bundled import PREFIX
from diffedit.edit import Edit
from diffedit.editor import Editor
from diffedit.errors import DiffEditError, OutputExistsError, RequestError, StorageError

logger = logging.getLogger("diffedit")

Status = Literal["written", "kept", "failed"]


class Outcome(BaseModel):
    """What became of one model.

    Attributes:
        model: what it was named by.
        out: the edited copy.
        status: `written` now, `kept` because it was there, whole, already, or `failed`.
        seconds: how long it took.
        code: of the error, "DE-600" or the like; "INTERNAL" for one that diffedit does not know.
        error: its message.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    out: str
    status: Status
    seconds: float
    code: str | None = None
    error: str | None = None


def apply_to_models(
    edits: Sequence[Edit],
    models: Sequence[str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, Outcome], None] | None = None,
    **loading: Any,
) -> tuple[Outcome, ...]:
    """Write an edited copy of every model into a folder.

    Args:
        edits: at least one; all of them go into every model.
        models: folders, `.safetensors` checkpoints or Hub ids; a copy has its model's name ("user--name" for a Hub id)
            and its model's form.
        out: the folder for the copies.
        overwrite: replace a copy that is there and is something else.
        progress: called after each model with its number, from 1, and its outcome.
        loading: `backend`, `device`, `dtype` and `config` for each `Editor`.

    Returns:
        One outcome per model, in order. Errors of single models are in there and are not raised.

    Raises:
        RequestError: there is nothing to do, or two copies would have one name, or a copy would be the model itself.
    """
    folder = Path(os.path.abspath(os.path.expanduser(out)))
    places = _places(edits, models, folder)
    outcomes = []
    for number, (model, place) in enumerate(places.items(), start=1):
        start = time.perf_counter()
        status, code, message = _attempt(edits, model, place, overwrite, loading)
        took = round(time.perf_counter() - start, 3)
        outcome = Outcome(model=model, out=str(place), status=status, seconds=took, code=code, error=message)
        logger.info("%s: %s%s", model, status, f", {message}" if message else "")
        outcomes.append(outcome)
        gc.collect()  # a model's modules refer to each other; the next one needs their memory
        if progress is not None:
            progress(number, outcome)
    return tuple(outcomes)


def save_edited(editor: Editor, path: Path, *, overwrite: bool = False) -> Status:
    """Save the live model, or keep what is there if it is the same.

    Args:
        editor: with the edits in its model.
        path: a folder, or a `.safetensors` file for a model that came from one.
        overwrite: replace what is there if it is something else.

    Raises:
        OutputExistsError: something else is there.
        StorageError: the file system refused; what was there is there still.
    """
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        editor.save_pipeline(path)
        return "written"
    state = saved_state(editor.backend, path)
    if state == "done":
        return "kept"
    single = path.suffix.lower() == SUFFIX
    if (state == "different" and not overwrite) or (single and not path.is_file()):
        raise OutputExistsError(
            "something else is already there",
            value=ascii(str(path)),
            cause="it is not this model with these edits, nor a part of that",
            hint="choose another folder or add --overwrite",
        )
    if single:
        _replace_file(editor, path)
        return "written"
    if state == "incomplete" and not (path / INDEX).is_file():  # no model yet, and nothing that the copy will not have
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise StorageError(
                "an incomplete copy cannot be removed", value=ascii(str(path)), cause=str(error)
            ) from error
    editor.save_pipeline(path, overwrite=True)
    return "written"


def _attempt(
    edits: Sequence[Edit], model: str, place: Path, overwrite: bool, loading: dict[str, Any]
) -> tuple[Status, str | None, str | None]:
    try:
        editor = Editor(model, **loading)
        for edit in edits:
            editor.load(edit.copy())  # a loaded edit keeps its model in memory
        return save_edited(editor, place, overwrite=overwrite), None, None
    except DiffEditError as error:
        return "failed", error.code, str(error)
    except Exception as error:  # whatever is wrong with one model, the others still have their turn
        return "failed", "INTERNAL", f"{type(error).__name__}: {error}"


def _places(edits: Sequence[Edit], models: Sequence[str | Path], folder: Path) -> dict[str, Path]:
    """Model -> where its copy goes."""
    if not edits or not models:
        what = "edits" if not edits else "models"
        raise RequestError(f"there are no {what}", value="[]", hint="name at least one")
    places: dict[str, Path] = {}
    for model in dict.fromkeys(str(model) for model in models):
        place = folder / copy_name(model)
        taken = next((other for other, there in places.items() if there == place), None)
        if taken is not None:
            raise RequestError(
                "two models would be written to one place",
                value=f"{taken} and {model}",
                cause=f"both copies would be {place.name}",
                hint="rename one, or use two runs with folders of their own",
            )
        source = os.path.expanduser(model)
        if os.path.exists(source) and os.path.exists(place) and os.path.samefile(source, place):
            raise RequestError(
                "a copy would be the model itself", value=model, hint="choose another folder for the copies"
            )
        places[model] = place
    return places


def copy_name(model: str) -> str:
    """The name of a model's copy.

    >>> copy_name("models/a.safetensors"), copy_name("models/b/"), copy_name("builtin:emoji")
    ('a.safetensors', 'b', 'emoji')
    >>> copy_name("user/name")
    'user--name'
    """
    path = os.path.expanduser(model)
    if model.startswith(PREFIX):
        return model.removeprefix(PREFIX)
    if not os.path.exists(path) and model.count("/") == 1 and not model.endswith(SUFFIX):
        return model.replace("/", "--")
    return os.path.basename(os.path.abspath(path))


def _replace_file(editor: Editor, path: Path) -> None:
    fresh = path.with_name(f"{path.stem}.new-{secrets.token_hex(4)}{path.suffix}")
    try:
        editor.save_pipeline(fresh)
        os.replace(fresh, path)
    finally:
        with suppress(OSError):
            os.unlink(fresh)
