"""`diffedit diff`: what differs between two models on disk, and which words that moves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffedit.cli import options
from diffedit.cli.describe import print_rows
from diffedit.cli.shell import Result, working
from diffedit.errors import RequestError

if TYPE_CHECKING:
    from diffedit.audit.records import ModelDiff

_SHOWN = 24
_WORDS_PER_LAYER = 3
_MAX_WORDS = 1 << 20

_Revision = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit, if that model is a Hub id.")
]


def diff(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE",
            help="The model to start from: builtin:emoji, a folder, a .safetensors file or a Hub id.",
            show_default=False,
        ),
    ],
    edited: Annotated[
        str, typer.Argument(metavar="EDITED", help="The model to look at, likewise.", show_default=False)
    ],
    word: Annotated[
        list[str] | None,
        typer.Option("--word", metavar="WORD", help="A word to run besides the others. May be repeated."),
    ] = None,
    words: Annotated[
        Path | None,
        typer.Option(
            "--words",
            metavar="FILE",
            help="Words to run, one a line. Default: the base's vocabulary, else general nouns.",
        ),
    ] = None,
    no_words: Annotated[
        bool, typer.Option("--no-words", help="Compare the weights only; the base's text encoder is not run.")
    ] = False,
    config: Annotated[
        str | None,
        typer.Option(
            "--config", metavar="FOLDER", help="For a single-file base: a folder or Hub id with its configuration."
        ),
    ] = None,
    base_revision: _Revision = None,
    edited_revision: _Revision = None,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 if the models differ.")] = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Result:
    """Compare two models: which weights differ, by how much and in how many directions, and which words that moves.

    Differences that are only rounding to another precision are told apart from edits.

    Example: diffedit diff runwayml/stable-diffusion-v1-5 erased.safetensors --word "van gogh"
    """
    if no_words and (word or words):
        raise RequestError("--no-words and words were both given", hint="drop one of them")
    listed = () if no_words else None if words is None else _read(words)
    with working(f"Comparing {base} and {edited}"):
        from diffedit.audit.diff import diff as compare

        found = compare(
            base,
            edited,
            words=listed,
            more_words=tuple(word or ()),
            config=config,
            base_revision=base_revision,
            edited_revision=edited_revision,
        )

    def render(console: Console) -> None:
        _print(console, found)

    payload = {"command": "diff", **found.model_dump(mode="json")}
    return Result(payload, render, exit_code=1 if exit_code and found.differs else 0)


def _read(path: Path) -> tuple[str, ...]:
    """Words of a file, one a line; blank lines and lines that start with # do not count."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_WORDS)
    except (OSError, UnicodeDecodeError) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise RequestError(
            "the list of words cannot be read", value=str(path), cause=cause, hint="give a text file, a word a line"
        ) from error
    words = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    if not words:
        raise RequestError("the list of words is empty", value=str(path), hint="use --no-words to run none")
    return words


def _print(console: Console, found: ModelDiff) -> None:
    console.print(f"[bold]{escape(found.guess)}[/]")
    for line in found.evidence:
        console.print(f"[dim]{escape(line)}[/]")
    if found.changed:
        console.print(_tensors(found))
    if len(found.changed) > _SHOWN:
        console.print(f"[dim]and {len(found.changed) - _SHOWN} more; --json lists all[/]")
    if found.overall is not None:
        console.print(_words(found))
    rounded = len(found.tensors) - len(found.changed)
    rows = [
        ("base", found.base),
        ("edited", found.edited),
        (
            "tensors",
            f"{found.compared} compared: {found.identical} identical, {rounded} rounding only, "
            f"{len(found.changed)} changed",
        ),
    ]
    if found.words_note is not None and found.changed:
        rows.append(("words", f"none run: {found.words_note}"))
    if found.words_unread:
        rows.append(("not run", ", ".join(found.words_unread)))
    rows += [
        ("not compared" if number == 0 else "", f"{item.what}: {item.reason}")
        for number, item in enumerate(found.not_compared)
    ]
    print_rows(console, rows)


def _tensors(found: ModelDiff) -> Table:
    from diffedit.audit.records import rank_text, size_text

    words = {table.layer: table for table in found.words}
    out = Table("changed tensor", "dtype", "rank", "size", "rows", "words that moved most")
    for column in out.columns[2:5]:
        column.justify = "right"
    out.columns[0].overflow = out.columns[5].overflow = "fold"
    for tensor in found.changed[:_SHOWN]:
        same = tensor.base_dtype == tensor.edited_dtype
        moved = words[tensor.name].words[:_WORDS_PER_LAYER] if tensor.name in words else ()
        out.add_row(
            escape(tensor.name),
            tensor.base_dtype if same else f"{tensor.base_dtype} -> {tensor.edited_dtype}",
            rank_text(tensor),
            size_text(tensor),
            f"{tensor.rows} of {tensor.shape[0] if tensor.shape else 1}",
            escape(", ".join(move.word for move in moved)),
        )
    return out


def _words(found: ModelDiff) -> Table:
    overall = found.overall
    layers = f"{len(found.words)} layers" if len(found.words) > 1 else "the layer"
    out = Table("", "word", "moved", "x median", title=f"Words that moved most at {layers}", title_justify="left")
    for column in (out.columns[0], *out.columns[2:]):
        column.justify = "right"
    if overall is None:
        return out
    for number, move in enumerate(overall.top, 1):
        ratio = f"{move.moved / overall.median:.1f}" if overall.median else ""
        out.add_row(str(number), escape(move.word), f"{move.moved:.2%}", ratio)
    out.add_section()
    out.add_row("", f"[dim]median of {len(overall.words)} words[/]", f"{overall.median:.2%}", "")
    return out
