"""`diffedit merge`: a new copy of a model, folder or single file, in which only the edited tensors differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffedit.cli import options
from diffedit.cli.describe import edit_payload, print_requests, print_rows
from diffedit.cli.editing import how_to_load, loading_fields, open_editor, refuse_existing
from diffedit.cli.shell import Result, working
from diffedit.errors import RequestError

_FILE = ".safetensors"


def merge(
    model: options.Model,
    edit: Annotated[
        list[Path],
        typer.Option("--edit", metavar="FOLDER", help="An edit to merge in. May be repeated.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            metavar="PATH",
            help="Folder for the new model, or a .safetensors file if the model is one.",
            show_default=False,
        ),
    ],
    config: Annotated[
        str | None,
        typer.Option(
            "--config", metavar="FOLDER", help="For a single-file model: a folder or Hub id with its configuration."
        ),
    ] = None,
    backend: options.BackendName = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    variant: options.Variant = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Result:
    """Write a new model with edits merged in; files and bytes that no edit touches stay as they are.

    Example: diffedit merge model.safetensors --edit no-dog -o model-without-dogs.safetensors
    """
    single = out.suffix.lower() == _FILE
    source = Path(model).expanduser()
    if single and not (source.suffix.lower() == _FILE and source.is_file()):
        hint = "give a folder with -o, or a .safetensors checkpoint as the model"
        raise RequestError("only a single-file model can be merged into a single file", value=repr(model), hint=hint)
    refuse_existing(out, overwrite=False)
    editor = open_editor(model, {**loading_fields(backend, device, dtype, variant), "config": config})
    with working(f"Loading {len(edit)} edits"):
        loaded = [editor.load(folder) for folder in edit]
    sites = sorted({site for item in loaded for site in item.delta.sites})
    with working(f"Saving {out}"):
        if single:
            from diffedit.backends.checkpoint import save_checkpoint

            changed = sorted(save_checkpoint(editor.backend, source, out, sites=sites))
        else:
            editor.save_pipeline(out)
            changed = [f"{site.name}.weight" for site in sites]
    edits, load = [edit_payload(item) for item in loaded], how_to_load(editor, out)

    def render(console: Console) -> None:
        for document in edits:
            print_requests(console, document)
        rows = [("changed" if number == 0 else "", name) for number, name in enumerate(changed)]
        print_rows(console, [*rows, ("saved", str(out)), load])

    return Result({"command": "merge", "edits": edits, "out": str(out), "changed": changed}, render)
