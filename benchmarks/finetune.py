"""What a fine-tuning baseline costs beside the closed form, and what each does, in one process on `builtin:emoji`.

For every subject and seed, in turn: `quickfix` three times (the median counts), as it is by default (all other objects
preserved) and with nothing preserved, then a baseline, `Editor.ablate` to weights written, on the same model with the
same target. Wall time depends on what else the machine does, so the figures to quote are the ratios to the `quickfix`
that ran right before: to the default if the baseline preserves too, to the bare one otherwise. The bundled scorer then
names pictures of the subject and of other objects, same prompts and seeds before and after; shares have exact
(Clopper-Pearson) 95% intervals.

One JSON file per (subject, seed, method): a run that was stopped goes on with what is missing. Trainings keep no
checkpoints here, for the time of one that was resumed would mean nothing.

    python -m benchmarks.finetune --subjects dog --seeds 0 --set esd.steps=60 --set esd.learning_rate=5e-4
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.logging import RichHandler
from scipy.stats import binomtest

from diffedit import Editor, registry
from diffedit.cli.settings import build
from diffedit.evaluate.scorer import Scorer
from diffedit.io.folder import write_file

BASELINES = ("finetune-text-encoder", "esd", "concept-ablation")
CLOSED_FORM = "quickfix"
REPEATS = 3
PROMPTS = ("a picture of a {}", "an icon of a {}")

logger = logging.getLogger("benchmark")


class Bench(NamedTuple):
    """What every measurement needs."""

    editor: Editor
    scorer: Scorer
    args: argparse.Namespace


def shares(hits: list[bool]) -> dict[str, float]:
    """A share with its exact 95% interval."""
    interval = binomtest(sum(hits), len(hits)).proportion_ci(confidence_level=0.95, method="exact")
    return {
        "hits": sum(hits),
        "n": len(hits),
        "share": sum(hits) / len(hits),
        "low": interval.low,
        "high": interval.high,
    }


def named(editor: Editor, scorer: Scorer, name: str, seeds: range) -> list[bool]:
    """Whether the scorer recognises each picture of an object."""
    pairs = [(PROMPTS[i % len(PROMPTS)].format(name), seed) for i, seed in enumerate(seeds)]
    seen = scorer.name_objects(editor.generate_pairs(pairs), editor.vocabulary.objects)
    return [found == name for found in seen]


def measure(bench: Bench, subject: str) -> dict[str, Any]:
    """How often the subject is still recognised, and how often near and far others are."""
    editor, scorer, args = bench
    few = range(args.first_seed, args.first_seed + max(2, args.images // 4))
    found = {"subject": shares(named(editor, scorer, subject, range(args.first_seed, args.first_seed + args.images)))}
    for group, names in others(args, subject).items():
        found[group] = shares([hit for name in names for hit in named(editor, scorer, name, few)])
    return found


def others(args: argparse.Namespace, subject: str) -> dict[str, list[str]]:
    """The objects that should stay, by group."""
    return {group: [name for name in getattr(args, group) if name != subject] for group in ("near", "far")}


def timed(
    editor: Editor, subject: str, target: str, updater: Any, seed: int, preserve: tuple[str, ...] | None = None
) -> tuple[Any, float]:
    """An edit, in the model, and its seconds."""
    start = time.perf_counter()
    edit = editor.ablate(subject, target=target, updater=updater, seed=seed, preserve=preserve)
    return edit, time.perf_counter() - start


def describe(edit: Any, updater: Any, seconds: list[float]) -> dict[str, Any]:
    """What an edit is made of and what it cost."""
    sites = edit.manifest.sites
    told = sites[0].diagnostics or {}
    return {
        "seconds": statistics.median(seconds),
        "runs": len(seconds),
        "settings": updater.model_dump(mode="json"),
        "sites": len(sites),
        "rank": max(site.rank for site in sites),
        "bytes": edit.delta.nbytes,
        "truncation_error": max((site.diagnostics or {}).get("truncation_error", 0.0) for site in sites),
        "losses": {key: told[key] for key in ("loss_before", "loss_trained", "loss_after") if key in told},
    }


def compare(
    bench: Bench, subject: str, target: str, seed: int, method: str, settings: dict[str, str], seen: dict[str, Any]
) -> dict[str, Any]:
    """The closed form and one baseline, one after the other; `seen` keeps what the closed form's pictures showed."""
    editor, _, args = bench
    load, seconds, bare = os.getloadavg()[0], [], []
    for _ in range(REPEATS):
        edit, taken = timed(editor, subject, target, CLOSED_FORM, seed, preserve=())
        bare.append(taken)
        editor.revert(edit)
        edit, taken = timed(editor, subject, target, CLOSED_FORM, seed)
        seconds.append(taken)
        editor.revert(edit)
    plain = describe(edit, registry.build("updaters", CLOSED_FORM), seconds)
    if not seen:  # the closed form knows no seed: it makes the same edit every time
        editor.load(edit)
        seen.update(measure(bench, subject))
        editor.revert(edit)
    plain |= seen
    updater = build("updaters", method, settings)
    edit, taken = timed(editor, subject, target, updater, seed)
    trained = describe(edit, updater, [taken]) | measure(bench, subject)
    editor.revert(edit)
    return {
        "subject": subject,
        "target": target,
        "seed": seed,
        "method": method,
        "others": others(args, subject),
        "images": args.images,
        "first_seed": args.first_seed,
        "ratio": trained["seconds"] / (plain["seconds"] if updater.preserves else statistics.median(bare)),
        "quickfix_seconds": {"preserving": seconds, "bare": bare},
        "load_before": load,
        "threads": args.threads,
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
        CLOSED_FORM: plain,
        "baseline": trained,
    }


def main() -> None:
    """Run what is missing and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/finetune"))
    parser.add_argument("--subjects", nargs="+", default=["dog"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="+", default=list(BASELINES), choices=BASELINES)
    parser.add_argument("--set", action="append", default=[], metavar="METHOD.KEY=VALUE")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--near", nargs="+", default=["cat", "fox", "wolf"])
    parser.add_argument("--far", nargs="+", default=["guitar", "pizza", "castle", "rose"])
    parser.add_argument("--first-seed", type=int, default=900_000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, handlers=[RichHandler()], format="%(message)s")
    torch.set_num_threads(args.threads)

    editor = Editor("builtin:emoji")
    bench = Bench(editor, Scorer.load("builtin:emoji-scorer"), args)
    settings: dict[str, dict[str, str]] = {method: {} for method in BASELINES}
    for text in args.set:
        method, _, pair = text.partition(".")
        key, _, value = pair.partition("=")
        settings[method][key] = value
    args.out.mkdir(parents=True, exist_ok=True)
    editor.revert(editor.ablate("rose", target="tulip"))  # the first call of anything is slower
    for subject in args.subjects:
        target = _target(editor, subject)
        unedited, seen = _measured_before(args, subject)
        for seed in args.seeds:
            for method in args.methods:
                path = args.out / f"{subject.replace(' ', '-')}-{seed}-{method}.json"
                if path.exists():
                    continue
                unedited = unedited or measure(bench, subject)
                record = compare(bench, subject, target, seed, method, settings[method], seen) | {"unedited": unedited}
                write_file(path, (json.dumps(record, indent=2) + "\n").encode(), overwrite=True)
                logger.info("%s: %s, ratio %.0f", subject, method, record["ratio"])
    records = [json.loads(path.read_text()) for path in sorted(args.out.glob("*-*-*.json"))]
    write_file(args.out.parent / "finetune.md", _table(records).encode(), overwrite=True)


def _measured_before(args: argparse.Namespace, subject: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an earlier record says of the same pictures, without an edit and with the closed form's; or empty."""
    for path in sorted(args.out.glob("*-*-*.json")):
        record = json.loads(path.read_text())
        same = (record["subject"], record["images"], record["first_seed"], record["others"])
        if same == (subject, args.images, args.first_seed, others(args, subject)):
            return record["unedited"], {key: record[CLOSED_FORM][key] for key in record["unedited"]}
    return {}, {}


def _target(editor: Editor, subject: str) -> str:
    """What `quickfix` would choose, so that every method has the same target."""
    edit = editor.ablate(subject)
    editor.revert(edit)
    return str(edit.requests[0].target)


def _table(records: list[dict[str, Any]]) -> str:
    """The records as one Markdown table; what they share stands once per subject."""
    columns = ("subject", "seed", "method", "settings changed", "subject left", "near kept", "far kept")
    rows = ["| " + " | ".join([*columns, "bytes", "ratio of time"]) + " |", "|" + "---|" * 9]
    subjects: set[str] = set()
    for record in records:
        if record["subject"] not in subjects:
            subjects.add(record["subject"])
            rows.append(_row({**record, "seed": ""}, "unedited", record["unedited"], "", ""))
            rows.append(_row({**record, "seed": ""}, CLOSED_FORM, record[CLOSED_FORM], _size(record, CLOSED_FORM), "1"))
        rows.append(
            _row(record, record["method"], record["baseline"], _size(record, "baseline"), f"{record['ratio']:,.0f}")
        )
    return "\n".join(rows) + "\n"


def _size(record: dict[str, Any], key: str) -> str:
    return f"{record[key]['bytes']:,}"


def _row(record: dict[str, Any], name: str, side: dict[str, Any], size: str, ratio: str) -> str:
    fields = registry.get("updaters", name).model_fields if "settings" in side else {}
    changed = [f"{key}={value}" for key, value in side.get("settings", {}).items() if value != fields[key].default]
    cells = [record["subject"], record["seed"], name, ", ".join(changed)]
    cells += [f"{side[key]['hits']} of {side[key]['n']}" for key in ("subject", "near", "far")]
    return "| " + " | ".join(str(cell) for cell in [*cells, size, ratio]) + " |"


if __name__ == "__main__":
    main()
