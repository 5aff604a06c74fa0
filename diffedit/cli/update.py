"""`diffedit update`: give a concept another meaning and save the edit."""

from __future__ import annotations

from typing import Annotated

import typer

from diffedit.cli import options
from diffedit.cli.editing import Job, concept_fields, loading_fields, run
from diffedit.cli.shell import Result


def update(
    model: options.Model,
    subject: Annotated[str, typer.Argument(metavar="SUBJECT", help="The concept to change.", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="What it should become.", show_default=False)],
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
    """Give a concept another meaning and save the edit.

    Example: diffedit update builtin:emoji house castle -o castles
    """
    return run(
        Job(
            command="update",
            model=model,
            subjects=[subject],
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
