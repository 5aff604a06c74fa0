"""`diffedit show`: what an edit on disk is, without any model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from diffedit.cli import options
from diffedit.cli.describe import curve_payload, edit_payload, print_provenance, print_requests, print_sites
from diffedit.cli.shell import Result, working


def show(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder that an edit was saved to.", show_default=False)
    ],
    trade_off: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw what the edit reaches against what it costs, per strength of the regularisation (.png, .svg).",
        ),
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Result:
    """Show what an edit does: concepts, targets and why, edited layers, norms, method, base.

    Example: diffedit show no-dog --trade-off curve.png
    """
    with working(f"Reading {folder}"):
        from diffedit.edit import Edit

        edit = Edit.load(folder)
        document = edit_payload(edit)
        payload: dict[str, Any] = {"command": "show", "folder": str(folder), "edit": document}
        if trade_off is not None:
            from diffedit.tradeoff import draw_trade_off
            from diffedit.tradeoff import trade_off as curves_of

            curves = curves_of(edit)
            payload["trade_off"] = [curve_payload(curve) for curve in curves]
            payload["plot"] = str(draw_trade_off(curves, trade_off))

    def render(console: Console) -> None:
        print_requests(console, document)
        print_sites(console, document)
        print_provenance(console, document)
        if trade_off is not None:
            console.print(f"Trade-off drawn to {trade_off}")

    return Result(payload, render)
