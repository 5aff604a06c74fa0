"""How long does one edit take at the true size of Stable Diffusion's text encoders, beside the textbook way?

Random weights: time does not depend on what the numbers mean. The words are one token each, as in CLIP's own
vocabulary (the tokenizer is the bundled model's). "ours" is the whole `Editor.ablate` call with a given
target and the method's defaults: spans, keys, float64 solve, the trial, all hashes, the write; "paper" is the same with
the paper's objective alone (everyday=0, give_up=None). The everyday moment is measured by the first edit. "textbook" is
what the published recipe does for the same four templates: full forward passes of all layers over all 77 positions,
then a dense float32 inverse. All run in one process, in turn, on the same weights; the figure to quote is their
ratio. Beside the clock the process's own processor time is measured, in which the thread that hashes counts too.
Default: one thread for torch.

    python -m benchmarks.edit_speed --out docs/results
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffedit import Editor, QuickFix
from diffedit.bundled import bundled
from diffedit.io.folder import write_file
from tests.tiny import build

_WARM = 4
TEMPLATES = ("{}", "photo of {}", "image of {}", "picture of {}")


def textbook(pipeline: Any, site_module: torch.nn.Linear) -> None:
    """The published recipe, at its own cost: full forwards, dense float32 normal equations, explicit inverse."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = site_module.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    length = pipeline.tokenizer.model_max_length
    try:
        with torch.no_grad():
            for template in TEMPLATES:
                pair = [template.format("dog"), template.format("cat")]
                batch = pipeline.tokenizer(
                    pair, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
                )
                pipeline.text_encoder(batch["input_ids"])
    finally:
        handle.remove()
    weight = site_module.weight.detach()
    left, right = 0.01 * weight, 0.01 * torch.eye(weight.shape[1])
    for keys, outputs in seen:
        k, v = keys[0, -1:].T, outputs[1, -1:].T
        left, right = left + v @ k.T, right + k @ k.T
    (left @ torch.inverse(right)).norm()


def once(work: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of one call: on the clock, and of this process's processor time."""
    start, used = time.perf_counter(), time.process_time()
    work()
    return 1000 * (time.perf_counter() - start), 1000 * (time.process_time() - used)


def alternate(pipeline: Any, runs: int) -> dict[str, Any]:
    """`runs` rounds, after two to warm up: the textbook, then six edits of each kind in a row.

    The first edit of a row finds in the processor's caches what ran before it and is reported apart, and so is the
    second; the four after them are the warm ones.
    """
    editor = Editor(pipeline)
    modules = pipeline.text_encoder.named_modules()
    module = next(module for name, module in modules if name.endswith("layers.0.self_attn.out_proj"))
    updaters = {"ours": QuickFix(), "paper": QuickFix(everyday=0, give_up=None)}
    first: dict[str, list[tuple[float, float]]] = {name: [] for name in updaters}
    second: dict[str, list[tuple[float, float]]] = {name: [] for name in updaters}
    warm: dict[str, list[tuple[float, float]]] = {name: [] for name in updaters}
    theirs = []
    for _ in range(runs + 2):
        theirs.append(once(lambda: textbook(pipeline, module)))
        for name, updater in updaters.items():
            for place in (first, second, *[warm] * _WARM):
                edit = partial(editor.ablate, "dog", target="cat", templates=TEMPLATES, updater=updater)
                place[name].append(once(edit))
                editor.revert()
    out: dict[str, Any] = {"first_edit_cpu_ms": first["ours"][0][1]}
    for kind, i in (("clock", 0), ("cpu", 1)):
        other = statistics.median(run[i] for run in theirs[2:])
        out[f"textbook_{kind}_ms"] = other
        for name in updaters:
            mine = [run[i] for run in warm[name][2 * _WARM :]]
            out |= {
                f"{name}_{kind}_ms": statistics.median(mine),
                f"{name}_{kind}_ms_range": [min(mine), max(mine)],
                f"{name}_ratio_{kind}": other / statistics.median(mine),
                f"{name}_first_of_row_{kind}_ms": statistics.median(run[i] for run in first[name][2:]),
                f"{name}_second_of_row_{kind}_ms": statistics.median(run[i] for run in second[name][2:]),
            }
    return out


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on, and how busy it was."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "load_average": os.getloadavg(),
    }


def main() -> None:
    """Measure both families and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"machine": machine(args.threads), "runs": args.runs}
    for family in ("sd1", "sd2"):
        pipeline = build.pipeline(bundled("model", "emoji") / "tokenizer", family=family, true_size=True)
        results[family] = alternate(pipeline, args.runs)
    write_file(args.out / "edit-speed.json", (json.dumps(results, indent=2) + "\n").encode(), overwrite=True)
    sys.stdout.write(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
