"""`diffedit verify`: whether an edit's folder is intact, and whether it fits a base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffedit.cli import options
from diffedit.cli.shell import Result, working

_COLOURS = {"pass": "green", "fail": "bold red", "skipped": "dim", "changed": "yellow"}


def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder that an edit was saved to.", show_default=False)
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="Its base: builtin:emoji, a folder, a .safetensors file or a Hub id. Default: no check of the base.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="NAME", help="Branch, tag or commit, if the base is a Hub id.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config", metavar="FOLDER", help="For a single-file base: a folder or Hub id with its configuration."
        ),
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Result:
    """Check an edit's folder: hashes, adapters, superfluous and missing files; with --base also that it fits the base.

    Exit codes: 0 no check failed, 1 a check failed, 2 there is no such folder or base. What was skipped or has changed
    is listed and not vouched for.

    Example: diffedit verify no-dog --base builtin:emoji
    """
    with working(f"Verifying {folder}"):
        from diffedit.audit.verify import verify as check

        found = check(folder, base, revision=revision, config=config)

    def render(console: Console) -> None:
        table = Table("check", "outcome", "detail")
        table.columns[0].overflow = table.columns[2].overflow = "fold"
        for item in found.checks:
            colour = _COLOURS[item.outcome]
            table.add_row(escape(item.name), f"[{colour}]{item.outcome}[/]", escape(item.detail))
        console.print(table)
        if found.failed:
            console.print(f"[bold red]{len(found.failed)} of {len(found.checks)} checks failed[/]")
        else:
            rest = f"; {len(found.unverified)} skipped or changed" if found.unverified else ""
            passed = len(found.checks) - len(found.unverified)
            console.print(f"[green]{passed} checks passed[/]{rest}")

    payload = {"command": "verify", "ok": found.ok, **found.model_dump(mode="json")}
    return Result(payload, render, exit_code=0 if found.ok else 1)
