"""`diffedit trace`: measure where a model keeps a concept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from diffedit.cli import options, settings
from diffedit.cli.describe import print_rows
from diffedit.cli.editing import loading_fields, open_editor, process_device
from diffedit.cli.shell import Result, working
from diffedit.errors import NoCausalSiteError, RequestError

if TYPE_CHECKING:
    from diffedit.tracing.result import CausalTrace

_TOP = 8


class ComponentName(StrEnum):
    """Values of `--component`."""

    TEXT_ENCODER = "text_encoder"
    UNET = "unet"


class ProbeSet(StrEnum):
    """Values of `--probes`."""

    OBJECT = "object"
    STYLE = "style"
    COLOUR = "colour"


def trace(
    model: options.Model,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="A prompt with the subject in it. May be repeated."),
    ] = None,
    subject: Annotated[str | None, typer.Option("--subject", metavar="NAME", help="What to trace.")] = None,
    probes: Annotated[
        ProbeSet | None, typer.Option("--probes", help="Instead: the bundled prompts of an attribute of builtin:emoji.")
    ] = None,
    component: Annotated[
        ComponentName, typer.Option("--component", help="What to look into.")
    ] = ComponentName.TEXT_ENCODER,
    measure: Annotated[
        str, typer.Option("--measure", metavar="NAME", help="embedding, denoising (cheap) or image (one per state).")
    ] = "denoising",
    scorer: Annotated[
        str | None,
        typer.Option("--scorer", metavar="CLIP", help="Judge of --measure image: a CLIP folder, Hub id or builtin:."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs per prompt.")] = 3,
    random_seed: options.RandomSeed = 0,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of causal-trace; see diffedit list."),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="Folder for the trace.")] = Path("trace"),
    plot: Annotated[bool, typer.Option("--plot", help="Also draw heatmap.png into the folder.")] = False,
    overwrite: options.Overwrite = False,
    backend: options.BackendName = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    variant: options.Variant = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Result:
    """Measure where a model keeps a concept: disturb its word, restore one state at a time, see what comes back.

    An interrupted trace goes on when it is started again with the same options. accelerate launch -m diffedit trace ...
    spreads the runs over processes.

    Example: diffedit trace builtin:emoji --prompt "a picture of a dog" --subject dog -o dog-trace --plot
    """
    if (probes is None) == (not prompt or subject is None):
        raise RequestError("a trace needs --prompt and --subject, or --probes", hint='add --subject "dog"')
    texts, _ = settings.split(setting or ())
    given: dict[str, str] = {"component": component.value, "measure": measure, "seeds": str(seeds)}
    twice = sorted(given.keys() & texts.keys())
    if twice:
        raise RequestError("the same setting was given twice", value=repr(twice[0]), hint=f"use --{twice[0]}")
    if scorer is not None:
        given["measure_settings"] = settings_json({"scorer": scorer})
    locator = settings.build("locators", "causal-trace", {**given, **texts})
    editor = open_editor(model, loading_fields(backend, process_device(device), dtype, variant))
    with working("Checking the prompts"):
        from diffedit.tracing.probes import load_probes
        from diffedit.tracing.run import estimate_seconds, first_process, processes
        from diffedit.tracing.run import trace as run

        pairs = [(text, str(subject)) for text in prompt or ()] if probes is None else load_probes(probes.value)
        tracer = locator.tracer(editor.backend, pairs, seed=random_seed)
        seconds = estimate_seconds(tracer)
    _announce(len(tracer.units), tracer.runs_per_unit(), seconds, processes())
    start = time.perf_counter()
    with _bar(len(tracer.units)) as progress:
        found = run(editor.backend, locator, pairs, seed=random_seed, out=out, overwrite=overwrite, progress=progress)
    if not first_process():
        raise typer.Exit(0)
    picture = found.plot(out / "heatmap.png") if plot else None
    took = time.perf_counter() - start
    return _report(found, out, picture, took)


def settings_json(value: dict[str, str]) -> str:
    """A mapping as the text that `--set` would carry."""
    import json as codec

    return codec.dumps(value)


def _announce(units: int, runs: int, seconds: float, processes: int) -> None:
    time_text = f"about {_duration(seconds)}" if seconds >= 1 else "a few seconds"
    spread = f" in {processes} processes" if processes > 1 else ""
    Console(stderr=True, highlight=False).print(f"{units} units of up to {runs} runs{spread}: {time_text}")


def _duration(seconds: float) -> str:
    """Seconds for people.

    >>> _duration(42), _duration(600), _duration(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def _bar(units: int) -> Iterator[Any]:
    console = Console(stderr=True)
    columns = (TextColumn("tracing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=units)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _report(found: CausalTrace, out: Path, picture: Path | None, took: float) -> Result:
    ranked = sorted((state for state in found.states if state.effect.n), key=lambda state: -state.effect.mean)
    total = found.total_effect
    try:
        location = found.best()
        best: dict[str, Any] | None = {
            "sites": [site.name for site in location.sites],
            "tokens": location.tokens.value,
            "effect": location.scores[0],
        }
        refusal = None
    except NoCausalSiteError as error:
        best, refusal = None, str(error)
    states = [
        {
            "part": state.part.name,
            "path": state.part.path,
            "tokens": state.column,
            "effect": state.effect.mean,
            "low": state.effect.low,
            "high": state.effect.high,
            "n": state.effect.n,
            "share": state.share,
            "causal": state.causal,
        }
        for state in ranked
    ]
    payload = {
        "command": "trace",
        "component": found.component,
        "measure": found.settings["measure"],
        "units": len(found.units),
        "total_effect": {"mean": total.mean, "low": total.low, "high": total.high, "n": total.n},
        "best": best,
        "refusal": refusal,
        "states": states,
        "folder": str(out),
        "plot": str(picture) if picture else None,
        "seconds": round(took, 1),
    }

    def render(console: Console) -> None:
        console.print(_table(states))
        rows = [("total effect", f"{total}, {total.n} runs")]
        rows += [("best site", f"{', '.join(best['sites'])} at {best['tokens']}")] if best else [("best site", "none")]
        rows += [("why not", refusal)] if refusal else []
        rows += [("saved", f"{out}/")] + ([("picture", str(picture))] if picture else [])
        print_rows(console, rows)

    return Result(payload, render)


def _table(states: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"strongest {min(_TOP, len(states))} of {len(states)} states", title_justify="left")
    for head in ("part", "tokens", "indirect effect", "95% interval", "share of total"):
        table.add_column(head)
    for state in states[:_TOP]:
        interval = f"{state['low']:.4f} to {state['high']:.4f}"
        table.add_row(
            state["part"], state["tokens"], f"{state['effect']:.4f}", interval, f"{100 * state['share']:.0f}%"
        )
    return table
