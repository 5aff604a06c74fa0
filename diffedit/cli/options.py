"""The options that several commands share, each described once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ConceptKind(StrEnum):
    """Values of `--kind`."""

    OBJECT = "object"
    STYLE = "style"


class Expansion(StrEnum):
    """Values of `--expand`."""

    NONE = "none"
    FORMS = "forms"
    ALL = "all"


class DtypeName(StrEnum):
    """Values of `--dtype`."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


_MODEL_PANEL = "The model"
_METHOD_PANEL = "The method"
_OUTPUT_PANEL = "Output"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="builtin:emoji, builtin:emoji-facts, a pipeline folder, a .safetensors checkpoint, or a Hub id.",
        show_default=False,
    ),
]
BackendName = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="Model family, if it cannot be told from the model.",
        rich_help_panel=_MODEL_PANEL,
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        "--variant",
        metavar="NAME",
        help="Of a folder or Hub id, the files to take: fp16 is model.fp16.safetensors.",
        rich_help_panel=_MODEL_PANEL,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="DEVICE", help="Where to run, such as cpu or cuda:0.", rich_help_panel=_MODEL_PANEL
    ),
]
Dtype = Annotated[
    DtypeName | None, typer.Option("--dtype", help="Precision to load the model in.", rich_help_panel=_MODEL_PANEL)
]

Kind = Annotated[
    ConceptKind | None,
    typer.Option("--kind", help="What the subject is. Default: known styles are styles, the rest objects."),
]
Alias = Annotated[
    list[str] | None,
    typer.Option("--alias", metavar="NAME", help="Another name of the subject, edited with it. May be repeated."),
]
Expand = Annotated[
    Expansion,
    typer.Option("--expand", help="Other names to edit too: forms (plural, hyphens, ...), all (misspellings too)."),
]
Preserve = Annotated[
    list[str] | None,
    typer.Option(
        "--preserve",
        metavar="CONCEPT",
        help="A concept that must stay. May be repeated. Default: all others of the model's vocabulary.",
    ),
]
Template = Annotated[
    list[str] | None,
    typer.Option("--template", metavar="TEXT", help='A prompt with one "{}" where the subject goes. May be repeated.'),
]
RandomSeed = Annotated[
    int, typer.Option("--random-seed", help="For methods that use chance. The closed form uses none.")
]

UpdaterName = Annotated[
    str,
    typer.Option(
        "--updater", metavar="NAME", help="How to compute the change; see diffedit list.", rich_help_panel=_METHOD_PANEL
    ),
]
LocatorName = Annotated[
    str | None,
    typer.Option(
        "--locator",
        metavar="NAME",
        help="How to choose the layers; see diffedit list. Default: the updater's own.",
        rich_help_panel=_METHOD_PANEL,
    ),
]
Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the updater, or locator.KEY=VALUE for the locator. May be repeated.",
        rich_help_panel=_METHOD_PANEL,
    ),
]

EditOut = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--out",
        metavar="FOLDER",
        help="Folder for the edit. Default: named after the edit.",
        rich_help_panel=_OUTPUT_PANEL,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.", rich_help_panel=_OUTPUT_PANEL)]
Preview = Annotated[
    bool,
    typer.Option(
        "--preview",
        help="Also draw before_after.png into the folder (takes minutes on a CPU for a full-size model).",
        rich_help_panel=_OUTPUT_PANEL,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.", rich_help_panel=_OUTPUT_PANEL)]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks and library warnings.", rich_help_panel=_OUTPUT_PANEL)
]

Seeds = Annotated[
    list[int] | None,
    typer.Option("--seed", metavar="N", help="Seed of a picture. May be repeated. [default: 0]", show_default=False),
]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Sampling steps. Default: the model's own.")]
Guidance = Annotated[
    float | None, typer.Option("--guidance", min=0.0, help="Guidance scale. Default: the model's own.")
]
Deadline = Annotated[
    float, typer.Option("--deadline", metavar="SECONDS", min=0.1, help="How long the Hub may take in all.")
]
EditFolders = Annotated[
    list[Path] | None, typer.Option("--edit", metavar="FOLDER", help="An edit to load first. May be repeated.")
]
