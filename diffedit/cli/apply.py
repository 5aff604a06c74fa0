"""`diffedit apply`: load edits onto one model or many, and save the whole, edited models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffedit.cli import options
from diffedit.cli.describe import edit_payload, print_requests, print_rows
from diffedit.cli.editing import how_to_load, loading_fields, open_editor, refuse_existing, usable_device
from diffedit.cli.shell import EXIT_FAILED, Result, working
from diffedit.errors import RequestError

if TYPE_CHECKING:
    from diffedit.edit import Edit
    from diffedit.fleet import Outcome

_COLOURS = {"written": "green", "kept": "cyan", "failed": "bold red"}


def apply(
    edit: Annotated[
        list[Path],
        typer.Option(
            "--edit",
            "--edits",
            metavar="FOLDER",
            help="An edit to load. --edit may be repeated, --edits takes several.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            metavar="PATH",
            help="Folder for the edited model, or with --models for the edited copies.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="builtin:emoji, a pipeline folder, a .safetensors checkpoint, or a Hub id.",
            show_default=False,
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--models", metavar="MODEL", help="Instead of MODEL: several, one after the other."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config", metavar="FOLDER", help="For single-file models: a folder or Hub id with their configuration."
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    backend: options.BackendName = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    variant: options.Variant = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Result:
    """Load edits onto a model and save the edited pipeline, ready for stock diffusers.

    With --models it writes an edited copy of each into the folder, one at a time, UNet and VAE unread. A copy that is
    there already is kept; a model that fails is reported and the others go on. Start it again to take up where it
    stopped.

    Example: diffedit apply builtin:emoji --edit no-dog --edit castles -o edited-model

    Example: diffedit apply --edits no-dog castles --models a.safetensors model-b -o edited
    """
    if (model is None) == (not models):
        hint = "name one as MODEL, or several with --models"
        raise RequestError("there is no model" if model is None else "both MODEL and --models are given", hint=hint)
    loading = {**loading_fields(backend, device, dtype, variant), "config": config}
    if models:
        return _apply_to_all(edit, models, out, overwrite, loading)
    refuse_existing(out, overwrite)
    editor = open_editor(str(model), loading)
    with working(f"Loading {len(edit)} edits"):
        loaded = [editor.load(folder) for folder in edit]
    with working(f"Saving {out}"):
        editor.save_pipeline(out, overwrite=overwrite)
    edits = [edit_payload(item) for item in loaded]
    load = how_to_load(editor, out)

    def render(console: Console) -> None:
        for document in edits:
            print_requests(console, document)
        print_rows(console, [("saved", f"{out}/" if out.is_dir() else str(out)), load])

    return Result({"command": "apply", "edits": edits, "folder": str(out)}, render)


def _apply_to_all(
    folders: list[Path], models: list[str], out: Path, overwrite: bool, loading: dict[str, Any]
) -> Result:
    with working(f"Loading {len(folders)} edits"):
        from diffedit.edit import Edit
        from diffedit.fleet import apply_to_models

        edits: list[Edit] = [Edit.from_pretrained(folder) for folder in folders]
        loading = usable_device(loading)
    stderr = Console(stderr=True, highlight=False)

    def progress(number: int, outcome: Outcome) -> None:
        stderr.print(f"{number}/{len(models)} {outcome.status} {escape(outcome.model)}", soft_wrap=True)

    with working(f"Editing {len(models)} models"):
        outcomes = apply_to_models(edits, models, out, overwrite=overwrite, progress=progress, **loading)
    documents = [edit_payload(edit) for edit in edits]
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in _COLOURS}

    def render(console: Console) -> None:
        for document in documents:
            print_requests(console, document)
        table = Table("model", "copy", "what happened", "seconds")
        for outcome in outcomes:
            colour = _COLOURS[outcome.status]
            said = f"[{colour}]{outcome.status}[/]" + (f" {escape(outcome.error)}" if outcome.error else "")
            copy = "" if outcome.status == "failed" else escape(outcome.out)
            table.add_row(escape(outcome.model), copy, said, f"{outcome.seconds:.1f}")
        console.print(table)
        console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count))

    payload = {
        "command": "apply",
        "edits": documents,
        "folder": str(out),
        **counts,
        "models": [outcome.model_dump() for outcome in outcomes],
    }
    return Result(payload, render, EXIT_FAILED if counts["failed"] else 0)
