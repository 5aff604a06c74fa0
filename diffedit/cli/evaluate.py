"""`diffedit evaluate`: measure by pictures what an edit does, for people and for pipelines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from diffedit.cli import options
from diffedit.cli.describe import print_rows
from diffedit.cli.editing import loading_fields, open_editor, process_device
from diffedit.cli.shell import Result, working
from diffedit.errors import RequestError

if TYPE_CHECKING:
    from diffedit.edit import Edit
    from diffedit.evaluate.gate import Verdict
    from diffedit.evaluate.records import Evaluation, Finding

_TESTS = "What is tested"
_GATE = "For pipelines"
_MAX_PROMPTS = 1 << 20


class Basis(StrEnum):
    """Values of `--judge-by`."""

    POINT = "point"
    BOUND = "bound"


def evaluate(
    model: options.Model,
    edit: Annotated[
        str, typer.Option("--edit", metavar="FOLDER", help="The edit: its folder, or user/name on the Hub.")
    ],
    images: Annotated[int, typer.Option("--images", min=1, help="Pictures per group, before and after each.")] = 50,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the first picture of each group.")] = 0,
    scorer: Annotated[
        str | None,
        typer.Option("--scorer", metavar="CLIP", help="The judge: a CLIP folder, Hub id or builtin:emoji-scorer."),
    ] = None,
    near: Annotated[
        list[str] | None,
        typer.Option(
            "--near", metavar="NAME", help="A near concept that must stay. May be repeated.", rich_help_panel=_TESTS
        ),
    ] = None,
    far: Annotated[
        list[str] | None,
        typer.Option(
            "--far", metavar="NAME", help="Another concept that must stay. May be repeated.", rich_help_panel=_TESTS
        ),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            "--alias",
            metavar="NAME",
            help="Another name of the subject to test. May be repeated.",
            rich_help_panel=_TESTS,
        ),
    ] = None,
    everyday: Annotated[
        Path | None,
        typer.Option("--everyday", metavar="FILE", help="Prompts for fidelity, one a line.", rich_help_panel=_TESTS),
    ] = None,
    least_detection: Annotated[
        float,
        typer.Option(
            "--least-detection",
            min=0.01,
            max=1.0,
            help="Share of the unedited model's pictures that the judge must recognise; below it there is no number.",
            rich_help_panel=_TESTS,
        ),
    ] = 0.7,
    require: Annotated[
        list[str] | None,
        typer.Option(
            "--require",
            metavar="NAME>=NUMBER",
            help='Exit with 1 if missed, such as "efficacy>=0.9". May be repeated.',
            rich_help_panel=_GATE,
        ),
    ] = None,
    judge_by: Annotated[
        Basis,
        typer.Option(
            "--judge-by",
            help="Compare the value, or the unfavourable bound of its 95% interval.",
            rich_help_panel=_GATE,
        ),
    ] = Basis.POINT,
    write_card: Annotated[
        bool, typer.Option("--write-card", help="Keep the numbers in the edit's folder: measured.json and README.md.")
    ] = False,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures sampled together.")] = 16,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="Folder for report and pictures.")] = Path(
        "evaluation"
    ),
    overwrite: options.Overwrite = False,
    backend: options.BackendName = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    variant: options.Variant = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Result:
    """Draw the same prompts and seeds without and with an edit, and judge what it does.

    Efficacy, generality, near and far specificity and fidelity, each with its number of pictures and a 95% interval.
    An interrupted evaluation goes on when it is started again with the same options. accelerate launch -m diffedit
    evaluate ... spreads the drawing over processes; the pictures are the same for any number.

    Example: diffedit evaluate builtin:emoji --edit no-dog -o no-dog-report --require "efficacy>=0.9"
    """
    prompts = () if everyday is None else _read(everyday)
    if write_card and not Path(edit).expanduser().is_dir():
        raise RequestError("--write-card needs the edit's folder", value=repr(edit), hint="pull the edit first")
    with working("Reading the edit"):
        from diffedit.edit import Edit
        from diffedit.evaluate.gate import Requirement, judge
        from diffedit.evaluate.report import REPORT, write_report
        from diffedit.evaluate.run import evaluate_edit, refuse_existing
        from diffedit.tracing.run import first_process

        requirements = [Requirement.parse(text) for text in require or ()]
        if not overwrite:
            refuse_existing(out)
        loaded = Edit.from_pretrained(edit)
    editor = open_editor(model, loading_fields(backend, process_device(device), dtype, variant))
    with _bar() as progress:
        found = evaluate_edit(
            editor,
            loaded,
            scorer=scorer,
            out=out,
            overwrite=overwrite,
            batch_size=batch_size,
            progress=progress,
            images=images,
            seed=seed,
            near=tuple(near or ()),
            far=tuple(far or ()),
            aliases=tuple(alias or ()),
            everyday=prompts,
            least_detection=least_detection,
            steps=steps,
            guidance=guidance,
        )
    if not first_process():
        raise typer.Exit(0)
    verdicts = judge(found, requirements, judge_by.value)
    if verdicts:
        write_report(found, out, verdicts)
    card = _write_card(loaded, Path(edit).expanduser(), found) if write_card else None
    return _report(found, out, out / REPORT, verdicts, judge_by, card)


def _read(path: Path) -> tuple[str, ...]:
    """Prompts of a file, one a line; blank lines and lines that start with # do not count."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_PROMPTS)
    except (OSError, UnicodeDecodeError) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = "give a text file, a prompt a line"
        raise RequestError("the list of prompts cannot be read", value=str(path), cause=cause, hint=hint) from error
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    if not prompts:
        raise RequestError("the list of prompts is empty", value=str(path), hint="write a prompt a line")
    return prompts


def _write_card(edit: Edit, folder: Path, found: Evaluation) -> Path:
    """The numbers into the edit's folder, and its card again with them."""
    from diffedit.io.edit_folder import CARD_FILE
    from diffedit.io.folder import write_file
    from diffedit.io.measured import MEASURED_FILE

    edit.record(found.measured())
    files = edit.files()
    write_file(folder / MEASURED_FILE, files[MEASURED_FILE], overwrite=True)
    return write_file(folder / CARD_FILE, files[CARD_FILE], overwrite=True)


@contextmanager
def _bar() -> Iterator[Any]:
    console = Console(stderr=True)
    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _report(
    found: Evaluation, out: Path, page: Path, verdicts: Sequence[Verdict], basis: Basis, card: Path | None
) -> Result:
    missed = [verdict for verdict in verdicts if not verdict.met]
    content = found.model_dump(mode="json", exclude={"pictures"})
    payload = {
        "command": "evaluate",
        "passed": not missed,
        "judged_by": basis.value,
        "requirements": [verdict.model_dump(mode="json") for verdict in verdicts],
        "evaluation": {**content, "pictures": len(found.pictures)},
        "folder": str(out),
        "report": str(page),
        "card": str(card) if card else None,
    }

    def render(console: Console) -> None:
        console.print(_table(found.findings))
        for verdict in verdicts:
            word = "[green]met[/]   " if verdict.met else "[bold red]missed[/]"
            console.print(f"{word} {escape(verdict.requirement)}  [dim]{escape(verdict.reason)}[/]")
        rows = [("report", str(page)), ("numbers", str(out / "evaluation.json"))]
        rows += [("card", str(card))] if card else []
        print_rows(console, rows)

    return Result(payload, render, exit_code=1 if missed else 0)


def _table(findings: Sequence[Finding]) -> Table:
    table = Table("measure", "value", "95% interval", "pairs", "")
    for column in table.columns[1:4]:
        column.justify = "right"
    for found in findings:
        name = found.name.replace("_", " ")
        if found.value is None or found.low is None or found.high is None:
            table.add_row(name, "[red]refused[/]", "", "", escape(found.refused or ""))
        else:
            left = found.left_out
            note = f"without {', '.join(f'{part.name} ({part.kind})' for part in left)}" if left else ""
            span = f"{found.low:.3f} to {found.high:.3f}"
            table.add_row(name, f"{found.value:.3f}", span, str(found.n), escape(note))
    return table
