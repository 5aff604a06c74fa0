"""`diffedit ablate`: suppress a concept and save the edit."""

from __future__ import annotations

from typing import Annotated

import typer

from diffedit.cli import options
from diffedit.cli.editing import Job, concept_fields, loading_fields, run
from diffedit.cli.shell import Result


def ablate(
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
    out: options.EditOut = None,
    overwrite: options.Overwrite = False,
    preview: options.Preview = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Result:
    """Suppress one or more concepts and save the edit.

    Example: diffedit ablate builtin:emoji dog --preserve wolf -o no-dog --preview
    """
    return run(
        Job(
            command="ablate",
            model=model,
            subjects=subject,
            target=target,
            loading=loading_fields(backend, device, dtype, variant),
            concept=concept_fields(kind, alias, expand, preserve, template, random_seed),
            updater=updater,
            locator=locator,
            pairs=setting or (),
            out=out,
            overwrite=overwrite,
            preview=preview,
        )
    )
