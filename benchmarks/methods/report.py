"""From finished cells to what is published, and from what is published to the pages.

    publish    cells of the run's folder -> results/methods/<part>.json, pictures of the edited models
    write      results/methods/*.json    -> results/methods.md, results/methods/pareto-*.png, a part of methods/index.md

`write` needs nothing but the published JSON, and writes the same bytes for the same JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods import figures, tables
from benchmarks.methods.plan import BEFORE, BEST, DEFAULT, PARTS, SINGLE, Cell, Record
from benchmarks.methods.pool import pooled
from benchmarks.methods.table import METHODS, REFERENCE, Setting
from benchmarks.methods.work import Folder
from diffedit.io.folder import write_file

HOME = "results/methods"
BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"
NOTHING = "No run is published yet: `make bench-methods` makes one."
_PICTURES = (
    "Per concept, each column the same prompt and seed: two prompts of the edit, an unseen one, a near and a far "
    "concept. Default settings."
)
_PAGES = {"quickfix-published": "quickfix", "esd-u": "esd"}  # methods that share a page
ROOT = Path(__file__).parents[2]
_INTRO = Path(__file__).with_name("results.md")


def publish(folder: Folder, cells: Sequence[Cell], chosen: Mapping[str, Setting], out: Path) -> None:
    """Write the finished cells of a plan as one JSON file per part; parts without any are left as they are."""
    done = folder.records()
    for part in PARTS:
        wanted = [cell for cell in cells if cell.part == part and cell.role != BEFORE]
        records = [done[cell.key] for cell in wanted if cell.key in done]
        if not records:
            continue
        settings = {name: dict(setting) for name, setting in chosen.items()}
        data = {"part": part, "missing": len(wanted) - len(records), "chosen": settings, "records": records}
        text = json.dumps(data, allow_nan=False, sort_keys=True, separators=(",", ":"))
        text = text.replace('{"becomes"', '\n{"becomes"').replace('{"cell"', '\n{"cell"') + "\n"
        write_file(out / HOME / f"{part}.json", text.encode(), overwrite=True)
        names = dict.fromkeys(record["cell"]["concepts"][0] for record in records)
        if part in SINGLE:
            figures.gallery(folder.path / "strips", part, list(names), out / HOME / f"pictures-{part}.png")


def write(out: Path) -> None:
    """Write the pages from the published JSON."""
    found = {part: _read(out / HOME / f"{part}.json") for part in PARTS}
    write_file(out / "results" / "methods.md", _results(found, out).encode(), overwrite=True)
    index = out / "methods" / "index.md"
    if index.is_file():
        text = index.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        _, _, tail = rest.partition(END)
        body = "\n".join(_numbers(found))
        write_file(index, f"{head}{BEGIN}\n\n{body}\n\n{END}{tail}".encode(), overwrite=True)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"records": [], "chosen": {}, "missing": 0}
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def _results(found: Mapping[str, Any], out: Path) -> str:
    lines = [_INTRO.read_text(encoding="utf-8").rstrip()]
    if not any(found[part]["records"] for part in PARTS):
        return "\n".join([*lines, "", NOTHING, ""])
    records = {part: found[part]["records"] for part in PARTS}
    for part in PARTS:
        if found[part]["missing"]:
            lines += ["", f"The part *{part}* is not complete; cells missing: {found[part]['missing']}."]
    if records["objects"] or records["many"]:
        lines += ["", "## Targets", "", *tables.goals(records["objects"], records["many"])]
        lines += _section("Where other methods do better", tables.rivals(tables.of_methods(records["objects"])), 3)
    for part in SINGLE:
        if records[part]:
            lines += _single(part, records[part], found[part]["chosen"], out)
    if records["many"]:
        lines += ["", "## Several concepts in one solve", "", *tables.many(records["many"], records["objects"])]
    if records["cost"]:
        edits = records["objects"] or records["tuning"]
        lines += ["", "## Cost", "", _machine(records["cost"]), "", *tables.costs(records["cost"], edits)]
    if records["tuning"]:
        lines += ["", "## Tuning", "", *tables.tuning(records["tuning"], found["tuning"]["chosen"])]
    return "\n".join(lines) + "\n"


def _single(part: str, made: Sequence[Record], chosen: Mapping[str, Any], out: Path) -> list[str]:
    records = tables.of_methods(made)
    first = made[0]["cell"]
    lines = ["", f"## {part.capitalize()}", ""]
    lines.append(f"{first['images']} pictures per measure and concept, before and after; seeds from {first['seed']}.")
    lines += ["", *tables.comparison(records, chosen)]
    common = tables.shared(records)
    if len(common) < len(records):
        names = dict.fromkeys(record["cell"]["concepts"][0] for record in common)
        lines += ["", f"All methods on the concepts that all were measured on ({', '.join(names)}):", ""]
        lines += tables.comparison(common, chosen)
    if figures.pareto(common, out / HOME / f"pareto-{part}.png"):
        lines += ["", f"![Efficacy against specificity, {part}](methods/pareto-{part}.png)"]
    if (out / HOME / f"pictures-{part}.png").is_file():
        lines += ["", _PICTURES]
        lines += ["", f"![Pictures of the edited models, {part}](methods/pictures-{part}.png)"]
    lines += _section(f"Each concept, `{REFERENCE}` by default, {part}", tables.each(records), 3)
    lines += _section(f"The parts of `{REFERENCE}`, {part}", tables.parts(made), 3)
    return lines + _section(f"Left out, {part}", tables.left_out(made), 3)


def _section(title: str, body: Sequence[str], level: int) -> list[str]:
    return ["", f"{'#' * level} {title}", "", *body] if body else []


def _machine(records: Sequence[Record]) -> str:
    machines = [record["machine"] for record in records if "machine" in record]
    if not machines:
        return ""
    one = machines[0]
    return f"{one['cpu']}, {one['cores']} cores, {one['threads']} thread, torch {one['torch']}; medians over concepts."


def _numbers(found: Mapping[str, Any]) -> list[str]:
    """The short table of the page "which method when"."""
    rows = []
    for method in METHODS:
        cells = [f"[`{method}`]({_PAGES.get(METHODS[method].updater, METHODS[method].updater)}.md)"]
        shown = False
        for part in SINGLE:
            by = tables.entries(tables.of_methods(found[part]["records"]))
            mine = by.get((method, BEST)) or by.get((method, DEFAULT))
            for name in ("efficacy", "specificity_near", "specificity_far"):
                value = pooled(name, mine, resamples=0).value if mine else None
                cells.append("" if value is None else f"{value:.0%}")
                shown = shown or value is not None
        cost = tables.entries(found["cost"]["records"])
        times = [r["ratio"] for r in cost.get((method, BEST)) or cost.get((method, DEFAULT)) or [] if not r["refused"]]
        cells.append(f"{sorted(times)[len(times) // 2]:,.3g}" if times else "")
        if shown:
            rows.append(cells)
    if not rows:
        return [NOTHING]
    head = ["method", *(f"{part}: {what}" for part in SINGLE for what in ("gone", "near kept", "far kept"))]
    text = (
        "Each method at the best setting that its grid holds. All numbers with their intervals, and the defaults: "
        "[Results of the benchmark](../results/methods.md)."
    )
    return [text, "", *tables.markdown([*head, f"time, `{REFERENCE}` = 1"], rows)]
