"""The benchmark's tables, from its records alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.methods.plan import BEST, DEFAULT, Record
from benchmarks.methods.pool import Pooled, harmonic, pooled
from benchmarks.methods.table import CROWD, METHODS, REFERENCE

SHARES = ("efficacy", "generality", "specificity_near", "specificity_far")
HEADS = {
    "efficacy": "efficacy",
    "generality": "generality",
    "specificity_near": "near kept",
    "specificity_far": "far kept",
    "becomes_target": "became the target",
    "fidelity_mmd": "CLIP-MMD",
    "fidelity_clip": "CLIPScore kept",
}
TARGETS = {"efficacy": 0.95, "generality": 0.90, "specificity_near": 0.95, "specificity_far": 0.99}
MANY_TARGETS = {"efficacy": 0.90, "specificity_near": 0.95, "specificity_far": 0.95}

Entry = tuple[str, str]


def entries(records: Iterable[Record]) -> dict[Entry, list[Record]]:
    """Records by (method, role), in the order of the table of methods, the default before the best."""
    found: dict[Entry, list[Record]] = {}
    for record in records:
        found.setdefault((record["cell"]["method"], record["cell"]["role"]), []).append(record)
    order = {(name, role): (i, j) for i, name in enumerate(METHODS) for j, role in enumerate((DEFAULT, BEST))}
    return {key: found[key] for key in sorted(found, key=lambda key: order.get(key, (len(order), 0)))}


def comparison(records: Sequence[Record], chosen: Mapping[str, Any]) -> list[str]:
    """One row per method and role: every finding with its interval."""
    head = ["method", "setting", "concepts", *HEADS.values()]
    rows = []
    for (method, role), mine in entries(records).items():
        cells = [f"`{method}`", _setting(mine[0], method, role, chosen), str(len(mine) - _refused(mine))]
        rows.append(cells + [show(name, pooled(name, mine)) for name in HEADS])
    return markdown(head, rows)


def of_methods(records: Iterable[Record]) -> list[Record]:
    """The records of methods in their own right: without those that show one part of the reference."""
    return [record for record in records if not METHODS[record["cell"]["method"]].part]


def parts(records: Sequence[Record]) -> list[str]:
    """The reference, and beside it what happens without one of its parts or with another; nothing if none was run."""
    by = {method: mine for (method, role), mine in entries(records).items() if role == DEFAULT}
    chosen = {method: mine for method, mine in by.items() if method == REFERENCE or METHODS[method].part}
    if len(chosen) < 2:
        return []
    rows = []
    for method, mine in chosen.items():
        cells = [f"`{method}`", METHODS[method].part or "as it is", str(len(mine) - _refused(mine))]
        rows.append([*cells, *(show(name, pooled(name, mine)) for name in HEADS), _bytes(mine)])
    return markdown(["", "what differs", "concepts", *HEADS.values(), "edit, bytes"], rows)


def each(records: Iterable[Record]) -> list[str]:
    """What the reference by default did to every concept: pictures of those that the judge had recognised before."""
    rows = []
    for record in records:
        if not _is(record, REFERENCE, DEFAULT) or record["refused"]:
            continue
        counts = []
        for group, gone in (("efficacy", True), ("generality", True), ("near", False), ("far", False)):
            mine = [row for row in record["rows"] if row["group"] == group]
            before, kept = (sum(row[what] for row in mine) for what in ("before", "kept"))
            counts.append(f"{before - kept if gone else kept} of {before}")
        others = [row for row in record["rows"] if row["group"] in ("near", "far") and row["kept"] < row["before"]]
        lost = ", ".join(dict.fromkeys(row["name"] for row in others)) or "none"
        rows.append([record["cell"]["concepts"][0], *(record["edit"]["target"] or [""]), *counts, lost])
    head = ["edited", "to", "gone", "gone in unseen prompts", "near kept", "far kept", "lost in a picture"]
    return markdown(head, rows) if rows else []


def shared(records: Sequence[Record]) -> list[Record]:
    """The records of those concepts that every method was measured on."""
    by = entries(records)
    sets = [{tuple(r["cell"]["concepts"]) for r in mine} for mine in by.values()]
    common = set.intersection(*sets) if sets else set()
    return [record for record in records if tuple(record["cell"]["concepts"]) in common]


def many(records: Sequence[Record], single: Sequence[Record]) -> list[str]:
    """Efficacy, generality and what stays of the untouched, by the number of concepts in one solve."""
    counts = sorted({len(record["cell"]["concepts"]) for record in records})
    methods = [name for name in METHODS if any(record["cell"]["method"] == name for record in records)]
    rows = []
    for method in methods:
        mine = [record for record in records if record["cell"]["method"] == method]
        role = mine[0]["cell"]["role"]
        alone = [r for r in single if (r["cell"]["method"], r["cell"]["role"]) == (method, role)]
        groups = [(1, alone)] if alone else []
        groups += [(count, [r for r in mine if len(r["cell"]["concepts"]) == count]) for count in counts]
        for count, group in groups:
            found = [show(name, pooled(name, group)) for name in SHARES]
            rows.append([f"`{method}`", mine[0]["label"], str(count), *found, _bytes(group)])
    return markdown(["method", "setting", "concepts at once", *(HEADS[name] for name in SHARES), "bytes"], rows)


def costs(records: Sequence[Record], edits: Sequence[Record]) -> list[str]:
    """Seconds, ratios, memory and bytes per method and role."""
    head = [
        "method",
        "setting",
        "seconds",
        "`quickfix` = 1",
        "`quickfix-bare` = 1",
        "peak MB",
        "edit, bytes",
        "as LoRA",
    ]
    rows = []
    for (method, role), mine in entries(records).items():
        made = [record for record in mine if not record["refused"]]
        if not made:
            rows.append([f"`{method}`", mine[0]["label"], f"refused: {mine[0]['refused']}", *[""] * 5])
            continue
        other = [r for r in edits if (r["cell"]["method"], r["cell"]["role"]) == (method, role) and not r["refused"]]
        sizes = [f"{median(r['edit'][key] for r in other):,.0f}" if other else "" for key in ("bytes", "lora_bytes")]
        numbers = [f"{median(r[key] for r in made):,.{places}f}" for key, places in _COSTS]
        peak = f"{median(r['peak_bytes'] for r in made) / 1e6:,.1f}"
        rows.append([f"`{method}`", made[0]["label"], *numbers, peak, *sizes])
    return markdown(head, rows)


_COSTS = (("seconds", 2), ("ratio", 1), ("ratio_bare", 1))


def tuning(records: Sequence[Record], chosen: Mapping[str, Any]) -> list[str]:
    """Every entry of every grid, the chosen ones marked."""
    rows = []
    for method in METHODS:
        labels = dict.fromkeys(r["label"] for r in records if r["cell"]["method"] == method)
        for label in labels:
            mine = [r for r in records if (r["cell"]["method"], r["label"]) == (method, label)]
            found = [pooled(name, mine, resamples=0) for name in SHARES]
            values = [item.value for item in found if item.value is not None]
            mean = f"{harmonic(values):.1%}" if len(values) == len(found) else "refused"
            mark = "best" if method in chosen and mine[0]["cell"]["setting"] == chosen[method] else ""
            rows.append([f"`{method}`", label, *(show(n, f) for n, f in zip(SHARES, found, strict=True)), mean, mark])
    return markdown(["method", "setting", *(HEADS[name] for name in SHARES), "harmonic mean", ""], rows)


def goals(objects: Sequence[Record], many: Sequence[Record]) -> list[str]:
    """The targets of the project beside what `quickfix` reaches, by default and as it is meant for many concepts."""
    rows = []
    groups = [("1 concept", REFERENCE, TARGETS, [r for r in objects if _is(r, REFERENCE, DEFAULT)])]
    for method in (REFERENCE, CROWD):
        most = [r for r in many if r["cell"]["method"] == method and len(r["cell"]["concepts"]) == 50]
        groups.append(("50 concepts at once", method, MANY_TARGETS, most))
    for what, method, goal, mine in groups:
        for name, least in goal.items():
            found = pooled(name, mine)
            met = "" if found.value is None else "yes" if found.value >= least else "**no**"
            rows.append([what, f"`{method}`", HEADS[name], f"{least:.0%}", show(name, found), met])
    return markdown(["", "method", "measure", "target", "reached", "met"], rows)


def rivals(records: Sequence[Record]) -> list[str]:
    """Per measure, the methods that do better than the reference's default on the same concepts; sentences."""
    by = entries(shared(records))
    own = by.get((REFERENCE, DEFAULT))
    if not own:
        return []
    out = []
    for name in SHARES:
        mine = pooled(name, own).value
        if mine is None:
            continue
        better = []
        for (method, role), group in by.items():
            found = pooled(name, group)
            if found.value is not None and found.value > mine + 1e-12 and METHODS[method].updater != REFERENCE:
                better.append(f"`{method}` ({role}, {found.value:.0%})")
        said = ", ".join(better) or "none"
        out.append(f"- **{HEADS[name]}** ({mine:.0%} for `{REFERENCE}`): better is {said}.")
    return out


def left_out(records: Sequence[Record]) -> list[str]:
    """What the detector did not see in the unedited model, and which edits were refused; sentences."""
    out = []
    by = entries(records)
    first = next(iter(by.values()), [])
    for name in SHARES:
        found = pooled(name, first)
        out += [f"- {HEADS[name]}: {what} does not count." for what in found.left_out]
    for (method, role), mine in by.items():
        reasons = {r["refused"]: r["cell"]["concepts"][0] for r in mine if r["refused"]}
        out += [f"- `{method}` ({role}) refused {_refused(mine)} of {len(mine)} edits, such as {concept}: {why}"
                for why, concept in list(reasons.items())[:1]]  # fmt: skip
    return out


def show(name: str, found: Pooled) -> str:
    """A finding in a cell: `97.0% (94 to 99)`, or `0.12 (0.08 to 0.17)` for a distance."""
    if found.value is None or found.low is None or found.high is None:
        return "refused"
    if name == "fidelity_mmd":
        return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
    return f"{found.value:.1%} ({100 * found.low:.0f} to {100 * found.high:.0f})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]


def _setting(record: Record, method: str, role: str, chosen: Mapping[str, Any]) -> str:
    if role == BEST:
        return f"best: {record['label']}"
    same = chosen.get(method) == record["cell"]["setting"]
    return "default, the best" if same else "default"


def _is(record: Record, method: str, role: str) -> bool:
    return (record["cell"]["method"], record["cell"]["role"]) == (method, role)


def _bytes(records: Sequence[Record]) -> str:
    """Median size of the edits that were made; empty if none was."""
    sizes = [record["edit"]["bytes"] for record in records if not record["refused"]]
    return f"{median(sizes):,.0f}" if sizes else ""


def _refused(records: Sequence[Record]) -> int:
    return sum(bool(record["refused"]) for record in records)
