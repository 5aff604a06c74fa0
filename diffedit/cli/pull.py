"""`diffedit pull`: get an edit from the Hub into a folder."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from diffedit.cli import options
from diffedit.cli.describe import edit_payload, print_requests, print_rows
from diffedit.cli.editing import refuse_existing
from diffedit.cli.shell import Result, working


def pull(
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="user/name, or user/name@commit, on the Hub.", show_default=False)
    ],
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="NAME", help="Branch, tag or commit. Default: main.")
    ] = None,
    out: options.EditOut = None,
    overwrite: options.Overwrite = False,
    deadline: options.Deadline = 120.0,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Result:
    """Get an edit from the Hub, check every byte of it, and save it as a folder.

    The folder's files are written anew from the checked edit; nothing else of the repository is used. With
    HF_HUB_OFFLINE=1 it comes from the cache.

    Example: diffedit pull me/no-dog --revision v1 -o no-dog
    """
    refuse_existing(out, overwrite)
    with working(f"Pulling {repo}"):
        from diffedit.edit import Edit
        from diffedit.io.hub import pull as fetch
        from diffedit.io.hub_calls import Patience

        pulled = fetch(repo, revision=revision, patience=Patience(deadline))
        edit = Edit.load(pulled.folder)
        folder = edit.save(out, overwrite=overwrite)
    document = edit_payload(edit)

    def render(console: Console) -> None:
        print_requests(console, document)
        print_rows(console, [("from", pulled.origin), ("saved", f"{folder}/"), ("edit id", edit.id)])

    payload = {"command": "pull", "origin": pulled.origin, "folder": str(folder), "edit": document}
    return Result(payload, render)
