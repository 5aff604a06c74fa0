"""`diffedit push`: bring an edit to the Hub as one commit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffedit.cli import options
from diffedit.cli.describe import edit_payload, print_requests, print_rows
from diffedit.cli.shell import Result, working


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder that an edit was saved to.", show_default=False)
    ],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="user/name on the Hub; made if it is missing.", show_default=False)
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public, or push to one that is. Default: private.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="BRANCH", help="Branch to push to, made if it is missing. Default: main."),
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    deadline: options.Deadline = 120.0,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Result:
    """Bring an edit to the Hub as one commit; what is there already is not sent again.

    The token is the one of `hf auth login` or of HF_TOKEN.

    Example: diffedit push no-dog me/no-dog
    """
    with working(f"Reading {folder}"):
        from diffedit.edit import Edit

        edit = Edit.load(folder)
    with working(f"Pushing to {repo}"):
        pushed = edit.push_to_hub(repo, private=not public, revision=revision, create_pr=create_pr, deadline=deadline)
    document = edit_payload(edit)

    def render(console: Console) -> None:
        print_requests(console, document)
        rows = [
            ("pushed" if pushed.created else "already there", pushed.url),
            ("commit", pushed.commit),
            ("visible to", "its owner only" if pushed.private else "everybody"),
            ("load it", f"editor.load({edit.origin!r})"),
        ]
        if pushed.pull_request:
            rows.insert(1, ("pull request", pushed.pull_request))
        print_rows(console, rows)

    payload = {"command": "push", "folder": str(folder), "edit_id": edit.id, "origin": edit.origin, **asdict(pushed)}
    return Result(payload, render)
