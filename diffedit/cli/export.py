"""`diffedit export`: an edit's adapters alone, in a chosen precision, for people who load LoRAs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffedit.cli import options
from diffedit.cli.describe import edit_payload, print_requests, print_rows
from diffedit.cli.editing import refuse_existing
from diffedit.cli.shell import Result, working


class LayoutName(StrEnum):
    """The layouts of `Edit.export`."""

    KOHYA = "kohya"
    DIFFUSERS = "diffusers"


def export(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder that an edit was saved to.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            metavar="PATH",
            help="Folder for kohya's and PEFT's adapters, or a .safetensors file for one LoRA alone.",
            show_default=False,
        ),
    ],
    dtype: Annotated[
        options.DtypeName, typer.Option("--dtype", help="Precision of the adapters.")
    ] = options.DtypeName.FLOAT32,
    layout: Annotated[
        LayoutName, typer.Option("--layout", help="Of a .safetensors file; every program reads kohya's.")
    ] = LayoutName.KOHYA,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Result:
    """Write an edit's adapters for diffusers, PEFT, ComfyUI and AUTOMATIC1111, and say what the precision costs.

    Example: diffedit export no-dog -o no-dog.safetensors --dtype float16
    """
    refuse_existing(out, overwrite=False)
    with working(f"Exporting {folder}"):
        import torch

        from diffedit.edit import Edit

        edit = Edit.load(folder)
        done = edit.export(out, dtype=getattr(torch, dtype.value), layout=layout.value)
    document = edit_payload(edit)

    def render(console: Console) -> None:
        print_requests(console, document)
        rows = [("saved", f"{out} ({sum(done.files.values()) / 1024:.1f} KB, {done.dtype})")]
        rows += [("rounding", f"the change differs by {done.rounding:.1e} of its size from the edit's")]
        print_rows(console, rows)

    payload = {"command": "export", "edit": document, "out": str(out), "dtype": done.dtype, "layout": layout.value}
    return Result({**payload, "rounding_error": done.rounding, "files": dict(done.files)}, render)
