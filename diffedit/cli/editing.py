"""What `ablate` and `update` have in common: open, edit, save, draw, report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from diffedit.cli import settings
from diffedit.cli.describe import edit_payload, print_requests, print_rows, print_sites
from diffedit.cli.options import ConceptKind, DtypeName, Expansion
from diffedit.cli.shell import Result, working
from diffedit.cli.training import editing
from diffedit.errors import OutputExistsError, RequestError, StorageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffedit.edit import Edit
    from diffedit.editor import Editor

PREVIEW_NAME = "before_after.png"
PREVIEW_SEEDS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Job:
    """Everything that `ablate` and `update` read from the command line.

    Attributes:
        command: name of the command.
        model: what the user named the model by.
        subjects: one or more concepts.
        target: what they become, or `None` to choose.
        loading: `backend`, `device`, `dtype` and `variant` for the model.
        concept: `kind`, `aliases`, `expand`, `preserve`, `templates` and `seed` of the request.
        updater: registered name.
        locator: registered name, or `None` for the one that the updater is made for.
        pairs: the texts given with `--set`.
        out: folder for the edit, or `None` for the default.
        overwrite: whether the folder may exist.
        preview: whether to draw the picture.
    """

    command: str
    model: str
    subjects: Sequence[str]
    target: str | None
    loading: dict[str, Any]
    concept: dict[str, Any]
    updater: str
    locator: str | None
    pairs: Sequence[str]
    out: Path | None
    overwrite: bool
    preview: bool


def concept_fields(
    kind: ConceptKind | None,
    alias: Sequence[str] | None,
    expand: Expansion,
    preserve: Sequence[str] | None,
    template: Sequence[str] | None,
    seed: int,
) -> dict[str, Any]:
    """The options about the concept as keyword arguments of `Editor.ablate` and `Editor.update`."""
    return {
        "kind": kind.value if kind else None,
        "aliases": tuple(alias or ()),
        "expand": expand.value,
        "preserve": tuple(preserve) if preserve else None,
        "templates": tuple(template or ()),
        "seed": seed,
    }


def loading_fields(
    backend: str | None, device: str | None, dtype: DtypeName | None, variant: str | None = None
) -> dict[str, Any]:
    """The options about the model as keyword arguments of `Editor`."""
    return {"backend": backend, "device": device, "dtype": dtype.value if dtype else None, "variant": variant}


def open_editor(model: str, loading: dict[str, Any]) -> Editor:
    """An `Editor`, behind a spinner (importing torch and loading weights take seconds)."""
    with working(f"Opening {model}"):
        from diffedit.editor import Editor

        return Editor(model, **usable_device(loading))


def how_to_load(editor: Editor, out: Path) -> tuple[str, str]:
    """The row of a report that says how stock diffusers loads the saved model."""
    loader = "from_single_file" if out.suffix.lower() == ".safetensors" else "from_pretrained"
    return "load it", f"{type(editor.backend.model.pipeline).__name__}.{loader}({str(out)!r})"


def process_device(given: str | None) -> str | None:
    """Each process of several that `accelerate launch` started takes its own accelerator, if the user names none."""
    if given is not None or "LOCAL_RANK" not in os.environ:
        return given
    import torch

    return f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else None


def usable_device(loading: dict[str, Any]) -> dict[str, Any]:
    """`loading` with a torch dtype, after a look whether the device can be used.

    Raises:
        RequestError: it cannot.
    """
    import torch

    device, dtype = loading["device"], loading["dtype"]
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RequestError(
                "that device cannot be used", value=repr(device), cause=cause, hint="try --device cpu"
            ) from error
    return {**loading, "dtype": getattr(torch, dtype) if dtype else None}


def run(job: Job) -> Result:
    """Carry out an `ablate` or `update` from the first check to the report."""
    refuse_existing(job.out, job.overwrite)
    for_updater, for_locator = settings.split(job.pairs)
    with working("Reading settings"):
        updater = settings.build("updaters", job.updater, for_updater)
        locator = settings.build("locators", job.locator or updater.locator, for_locator)
    editor = open_editor(job.model, job.loading)
    with editing(f"Editing {', '.join(job.subjects)}", updater) as updater:
        chosen = {**job.concept, "updater": updater, "locator": locator}
        if job.command == "update" and job.target is not None:
            edit = editor.update(job.subjects[0], job.target, **chosen)
        else:
            edit = editor.ablate(list(job.subjects), target=job.target, **chosen)
        folder = _shortest(edit.save(job.out, overwrite=job.overwrite))
    picture = folder / PREVIEW_NAME if job.preview else None
    if picture:
        save_image(draw_preview(editor, edit), picture)
    return _report(job.command, edit, folder, picture)


def refuse_existing(out: Path | None, overwrite: bool) -> None:
    """Fail before minutes of work if the output could not be written in the end."""
    if out is not None and not overwrite and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExistsError(
            "the output is already there",
            value=str(out),
            cause="nothing is overwritten silently",
            hint="choose another name or add --overwrite",
        )


def draw_preview(editor: Editor, edit: Edit, seeds: Sequence[int] = PREVIEW_SEEDS) -> Image:
    """The picture of an applied edit: generates with it, reverts it, generates again."""
    from diffedit.cli.preview import Row, before_after_grid
    from diffedit.cli.scenes import choose_scenes

    scenes = choose_scenes(editor, edit.requests)
    prompts = [scene.prompt for scene in scenes]
    with working(f"Drawing {2 * len(prompts) * len(seeds)} pictures"):
        after = editor.generate(prompts, seeds=seeds)
        editor.revert(edit)
        before = editor.generate(prompts, seeds=seeds)
        editor.load(edit)
    n = len(seeds)
    rows = [
        Row(scene.group, scene.prompt, before[n * index : n * (index + 1)], after[n * index : n * (index + 1)])
        for index, scene in enumerate(scenes)
    ]
    title = "; ".join(f"{request.action} {request.subject!r} -> {request.target!r}" for request in edit.requests)
    base = edit.manifest.base.source
    return before_after_grid(rows, seeds=seeds, title=title, note=f"{base}, same prompts and seeds on both sides")


def save_image(image: Image, path: Path) -> None:
    """Write a PNG; a refusal of the file system becomes a `StorageError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="PNG")
    except OSError as error:
        raise StorageError(
            "the picture could not be written", value=str(path), cause=str(error), hint="choose another place"
        ) from error


def _report(command: str, edit: Edit, folder: Path, picture: Path | None) -> Result:
    document = edit_payload(edit)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    payload = {
        "command": command,
        "edit": document,
        "folder": str(folder),
        "files": files,
        "preview": str(picture) if picture else None,
        "notes": list(edit.notes),
    }

    def render(console: Console) -> None:
        print_requests(console, document)
        print_sites(console, document)
        kept = edit_size(files)
        rows = [("saved", f"{folder}/ ({kept / 1024:.1f} KB in {len(files) - bool(picture)} files)")]
        rows += [("picture", str(picture))] if picture else []
        rows += [("note", note) for note in edit.notes]
        rows += [
            ("load it", f"pipe.load_lora_weights({str(folder)!r})   # stock diffusers"),
            *(("", f"{call}   # stock PEFT") for call in _peft_calls(edit, folder)),
        ]
        print_rows(console, rows)

    return Result(payload, render)


def _peft_calls(edit: Edit, folder: Path) -> list[str]:
    """One for each edited component: a PEFT adapter belongs to one model."""
    components = sorted({site.component for site in edit.manifest.sites})
    where = {part: "" if part == "text_encoder" else f", subfolder={part!r}" for part in components}
    return [f"PeftModel.from_pretrained(pipe.{part}, {str(folder)!r}{inside})" for part, inside in where.items()]


def _shortest(path: Path) -> Path:
    """The path from here, if it lies below the working directory."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def edit_size(files: dict[str, int]) -> int:
    """Bytes of an edit's own files: the picture beside them does not count."""
    return sum(size for name, size in files.items() if name != PREVIEW_NAME)
