"""`diffedit plan`: what `ablate` with the same options would do and cost, without doing it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from diffedit.cli import options, settings
from diffedit.cli.describe import print_requests, print_rows, request_payload
from diffedit.cli.editing import concept_fields, loading_fields, open_editor
from diffedit.cli.shell import Result, working

if TYPE_CHECKING:
    from diffedit.plan import Plan


def plan(
    model: options.Model,
    subject: Annotated[
        list[str], typer.Argument(metavar="SUBJECT", help="Concepts to suppress, in one edit.", show_default=False)
    ],
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="CONCEPT", help="What takes its place. Default: chosen and reported."),
    ] = None,
    kind: options.Kind = None,
    alias: options.Alias = None,
    expand: options.Expand = options.Expansion.NONE,
    preserve: options.Preserve = None,
    template: options.Template = None,
    random_seed: options.RandomSeed = 0,
    updater: options.UpdaterName = "quickfix",
    locator: options.LocatorName = None,
    setting: options.Setting = None,
    backend: options.BackendName = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    variant: options.Variant = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Result:
    """Say what ablate with the same options would do and cost: targets, sites, ranks, size, time and memory.

    Nothing is changed and nothing is written.

    Example: diffedit plan builtin:emoji dog --preserve wolf
    """
    for_updater, for_locator = settings.split(setting or ())
    with working("Reading settings"):
        method = settings.build("updaters", updater, for_updater)
        finder = settings.build("locators", locator or method.locator, for_locator)
    editor = open_editor(model, loading_fields(backend, device, dtype, variant))
    said = concept_fields(kind, alias, expand, preserve, template, random_seed)
    with working(f"Planning {', '.join(subject)[:80]}"):
        found = editor.plan(list(subject), target=target, updater=method, locator=finder, **said)
    payload = {"command": "plan", **found.model_dump(mode="json"), "bytes": found.bytes}
    return Result(payload, lambda console: _print(console, found))


def _print(console: Console, found: Plan) -> None:
    from diffedit.plan import duration, size

    reasons = zip(found.requests, found.target_reasons, strict=True)
    print_requests(console, {"requests": [request_payload(request, reason) for request, reason in reasons]})
    table = Table("edit site", "shape", "rank, expected", "at most")
    for column in table.columns[1:]:
        column.justify = "right"
    for site in found.sites:
        rank = "unknown" if site.rank is None else str(site.rank)
        table.add_row(site.name, f"{site.d_out} x {site.d_in}", rank, str(site.rank_bound))
    console.print(table)
    rows = [
        ("method", f"{found.updater}, sites by {found.locator}, tokens: {found.tokens.value}"),
        ("work", f"{found.prompts} prompts, {'unknown' if found.pairs is None else found.pairs} pairs"),
    ]
    if found.seconds is not None and found.memory is not None:
        rows += [
            ("time", f"about {duration(found.seconds)}"),
            ("memory", f"about {size(found.memory)} above the model"),
        ]
    if found.choosing_seconds:
        rows.append(("targets", f"took {duration(found.choosing_seconds)} to choose, beside that"))
    if found.bytes is not None:
        rows.append(("edit", f"about {size(found.bytes)} in {len(found.files)} files"))
    print_rows(console, [*rows, *(("note", note) for note in found.notes)])
