"""How do time and memory of one solve grow with the number of concepts, at the true size of SD 1.x's text encoder?

Random weights, made-up names (`benchmarks.names`), four templates each, one target for all. "ours" is the whole
`Editor.ablate([...])` call, hashes and write included. "textbook" is the published recipe (`benchmarks.edit_speed`) for
one concept, run in turn with ours for up to ten concepts. For n concepts it needs n times its forward passes, so n
times its time is what the ratio compares with: from n = 10 on an extrapolation.

Memory is the growth of the process's largest resident size above the loaded model after a first edit; the numbers of
concepts ascend, so each reading belongs to its own.

    python -m benchmarks.scale --out docs/results
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.edit_speed import machine, once, textbook
from benchmarks.names import TEMPLATES, names, write_tokenizer
from diffedit import Editor, QuickFix
from diffedit.edit import Edit
from diffedit.io.folder import write_file
from tests.tiny import build


def peak_mb() -> float:
    """Largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(
    editor: Editor,
    pipeline: Any,
    subjects: list[str],
    runs: int,
    above: float,
    theirs: list[tuple[float, float]],
    updater: QuickFix,
) -> dict[str, Any]:
    """One number of concepts: medians of `runs` edits, after one to warm up.

    Up to ten concepts each edit is followed by one textbook edit, and `theirs` becomes the times of these.
    """
    module = pipeline.text_encoder.get_submodule("encoder.layers.0.self_attn.out_proj")
    ours = []
    edit: Edit | None = None
    if len(subjects) <= 10:
        theirs.clear()
    for _ in range(runs + 1):
        edit = None  # an earlier edit's pairs are not this one's memory
        ours.append(once(lambda: editor.ablate(subjects, target="artist", templates=TEMPLATES, updater=updater)))
        edit = editor.edits[0]
        editor.revert()
        if len(subjects) <= 10:
            theirs.append(once(lambda: textbook(pipeline, module)))
    if edit is None:
        raise SystemExit("at least one run is needed")
    (diagnostics,) = edit.delta.diagnostics.values()
    out: dict[str, Any] = {
        "concepts": len(subjects),
        "runs": runs,
        "peak_mb_above_model": peak_mb() - above,
        "rank": edit.manifest.sites[0].rank,
        "condition": diagnostics.condition,
    }
    for kind, i in (("clock", 0), ("cpu", 1)):
        mine, other = (statistics.median(run[i] for run in side[1:]) for side in (ours, theirs))
        out |= {
            f"ours_{kind}_ms": mine,
            f"ours_{kind}_ms_range": [min(run[i] for run in ours[1:]), max(run[i] for run in ours[1:])],
            f"textbook_one_{kind}_ms": other,
            f"ratio_{kind}": len(subjects) * other / mine,
        }
    return out


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Seconds against the number of concepts, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), dpi=90)
    n = [row["concepts"] for row in results]
    axes.loglog(n, [row["ours_clock_ms"] / 1000 for row in results], "o-", label="diffedit, one solve")
    textbook_seconds = [row["concepts"] * row["textbook_one_clock_ms"] / 1000 for row in results]
    axes.loglog(n, textbook_seconds, "s--", label="textbook, n times one (extrapolated)")
    axes.set_xlabel("concepts")
    axes.set_ylabel("seconds")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Measure, write one JSON file and one picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--picture", type=Path, default=Path("docs/assets/scale.png"))
    parser.add_argument("--numbers", type=int, nargs="+", default=[1, 10, 100, 1000, 10_000])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--paper", action="store_true", help="the paper's objective alone: everyday=0, give_up=None")
    args = parser.parse_args()
    if min(args.numbers) > 10:
        parser.error("--numbers needs one of at most 10: the textbook runs beside it")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = build.pipeline(write_tokenizer(Path(folder)), family="sd1", true_size=True)
    editor, subjects = Editor(pipeline), names(max(args.numbers))
    updater = QuickFix(everyday=0, give_up=None) if args.paper else QuickFix()
    editor.ablate("dog", target="cat", templates=TEMPLATES, updater=updater)
    editor.revert()
    above, rows = peak_mb(), []
    theirs: list[tuple[float, float]] = []
    results: dict[str, Any] = {"machine": machine(args.threads), "rows": rows}
    for n in sorted(args.numbers):
        rows.append(measure(editor, pipeline, subjects[:n], args.runs, above, theirs, updater))
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()
        write_file(
            args.out / ("scale-paper.json" if args.paper else "scale.json"),
            (json.dumps(results, indent=2) + "\n").encode(),
            overwrite=True,
        )
    plot(rows, args.picture)


if __name__ == "__main__":
    main()
