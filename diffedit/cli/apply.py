"""`diffedit apply`: load edits onto a model and save the whole, edited pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffedit.cli import options
from diffedit.cli.describe import edit_payload, print_requests, print_rows
from diffedit.cli.editing import loading_fields, open_editor, refuse_existing
from diffedit.cli.shell import Result, working


def apply(
    model: options.Model,
    edit: Annotated[
        list[Path],
        typer.Option("--edit", metavar="FOLDER", help="An edit to load. May be repeated.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FOLDER", help="Folder for the edited pipeline.", show_default=False)
    ],
    overwrite: options.Overwrite = False,
    backend: options.BackendName = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Result:
    """Load edits onto a model and save the edited pipeline, ready for stock diffusers.

    Example: diffedit apply builtin:emoji --edit no-dog --edit castles -o edited-model
    """
    refuse_existing(out, overwrite)
    editor = open_editor(model, loading_fields(backend, device, dtype))
    with working(f"Loading {len(edit)} edits"):
        loaded = [editor.load(folder) for folder in edit]
    with working(f"Saving {out}"):
        editor.save_pipeline(out, overwrite=overwrite)
    edits = [edit_payload(item) for item in loaded]

    def render(console: Console) -> None:
        for document in edits:
            print_requests(console, document)
        print_rows(
            console, [("saved", f"{out}/"), ("load it", f"StableDiffusionPipeline.from_pretrained({str(out)!r})")]
        )

    return Result({"command": "apply", "edits": edits, "folder": str(out)}, render)
