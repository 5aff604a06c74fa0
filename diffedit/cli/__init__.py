"""The command line, `diffedit COMMAND`.

One thin file per command; what they share lives in `shell` (results, errors, exit codes), `options`, `settings`,
`editing` and `describe`. Torch is imported inside commands only, so `--help` and usage errors answer at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from diffedit._version import __version__
from diffedit.cli import (
    ablate,
    apply,
    diff,
    evaluate,
    export,
    generate,
    listing,
    merge,
    plan,
    pull,
    push,
    show,
    trace,
    update,
    verify,
)
from diffedit.cli.lists import ListCommand
from diffedit.cli.shell import Group

app = typer.Typer(
    cls=Group,
    add_completion=False,
    no_args_is_help=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffedit {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Edit concepts in text-to-image models: a closed-form low-rank change of a text-encoder weight.

    Exit codes: 0 done, 1 the work failed, 2 the input has to change, 130 interrupted.
    """


app.command("ablate")(ablate.ablate)
app.command("update")(update.update)
app.command("plan")(plan.plan)
app.command("apply", cls=ListCommand)(apply.apply)
app.command("merge")(merge.merge)
app.command("export")(export.export)
app.command("show")(show.show)
app.command("verify")(verify.verify)
app.command("diff")(diff.diff)
app.command("generate")(generate.generate)
app.command("push")(push.push)
app.command("pull")(pull.pull)
app.command("trace")(trace.trace)
app.command("evaluate")(evaluate.evaluate)
app.command("list")(listing.list_plugins)

__all__ = ["app"]
