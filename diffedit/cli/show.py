"""`diffedit show`: what an edit on disk is, without any model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffedit.cli import options
from diffedit.cli.describe import edit_payload, print_provenance, print_requests, print_sites
from diffedit.cli.shell import Result, working


def show(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder that an edit was saved to.", show_default=False)
    ],
    json: options.Json = False,
    debug: options.Debug = False,
) -> Result:
    """Show what an edit does: concepts, targets and why, edited layers, norms, method, base.

    Example: diffedit show no-dog
    """
    with working(f"Reading {folder}"):
        from diffedit.edit import Edit

        document = edit_payload(Edit.load(folder))

    def render(console: Console) -> None:
        print_requests(console, document)
        print_sites(console, document)
        print_provenance(console, document)

    return Result({"command": "show", "folder": str(folder), "edit": document}, render)
