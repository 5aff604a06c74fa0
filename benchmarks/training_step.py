"""What does one training step of ESD and of concept ablation cost at the true size of Stable Diffusion 1.4?

The pipeline is built from the published configuration with random weights, in float32: UNet of 860 million parameters,
text encoder of 123 million, latents of 4 x 64 x 64; time does not depend on what the numbers mean. The steps are those
of `diffedit.updaters.finetune`, through the `FineTune.train` that an edit runs, stopped from its progress callback. One
step warms up and is not counted. One-concept `quickfix` edits run in the same process, before and after each method.

A step of ESD begins with a sampling that stops at a random one of 50 denoising steps. How many it did is counted and
timed (a forward hook on the UNet), so that a whole training can be put together from the mean, 24.5. What is measured
is a step; every total is that times a published number of steps, and the JSON and the table say which.

    python -m benchmarks.training_step --out docs/results

Needs 12 GB of memory and, with two threads, about an hour. A method that is in the JSON file already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.edit_speed import TEMPLATES, machine
from benchmarks.loading import UNET
from diffedit import Editor, Request, registry
from diffedit.io.folder import write_file
from tests.tiny import build

CASES = {
    "concept-ablation, batch 1": ("concept-ablation", 1),
    "esd, batch 1": ("esd", 1),
    "concept-ablation, batch 2": ("concept-ablation", 2),
}
SEED = 60266  # its steps of ESD stop sampling after 1 pass (the one that warms up), 2, 1 and 7: most take far longer
PUBLISHED = {
    "esd": [("the authors' current code", 200), ("the paper", 1000)],
    "concept-ablation": [("the paper, shortest", 100), ("the paper, longest", 200)],
}
BATCH = {"esd": 1, "concept-ablation": 8}  # published
SAMPLING = 50  # denoising steps of a whole sampling
ANCHORS = 200  # pictures that concept ablation makes of its anchor before training


class Enough(Exception):
    """The steps that were wanted are done."""


def pipeline(folder: Path) -> Any:
    """Stable Diffusion 1.4 from its configuration; the VAE, which no training runs, is a tiny one."""
    from diffusers import UNet2DConditionModel

    pipe = build.pipeline(build.write_tokenizer(folder), true_size=True)
    torch.manual_seed(2)
    pipe.unet = UNet2DConditionModel(**UNET, sample_size=64).eval()
    pipe.text_encoder.resize_token_embeddings(49408, mean_resizing=False)
    return pipe


class Passes:
    """Counts and times the UNet's passes without gradients over a given number of rows."""

    def __init__(self, rows: int) -> None:
        self._rows, self._started = rows, [0.0, 0.0]
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self.count, self.seconds = 0, [0.0, 0.0]

    def before(self, module: torch.nn.Module, args: Any) -> None:
        """Forward pre-hook."""
        if args[0].shape[1:] != (4, 64, 64):
            raise SystemExit(f"latents of {tuple(args[0].shape)}, not 4 x 64 x 64")
        self._started = now()

    def after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Forward hook."""
        if not torch.is_grad_enabled() and len(args[0]) == self._rows:
            self.count += 1
            self.seconds = [sum(pair) for pair in zip(self.seconds, since(self._started), strict=True)]


def now() -> list[float]:
    """Clock and processor time, in seconds."""
    return [time.perf_counter(), time.process_time()]


def since(start: list[float]) -> list[float]:
    """Seconds since `now()` was `start`."""
    return [end - begin for end, begin in zip(now(), start, strict=True)]


def train(editor: Editor, method: str, batch: int, steps: int) -> list[dict[str, Any]]:
    """`steps` real steps after one to warm up: [clock, processor] seconds in all, and of its sampling."""
    cheap: dict[str, Any] = {"anchors": 1, "sampling_steps": 1} if method == "concept-ablation" else {}
    cls = registry.get("updaters", method)
    updater: Any = cls(batch_size=batch, evaluations=1, evaluate_every=10_000, steps=10_000, **cheap)
    location = registry.build("locators", updater.locator).locate(editor.backend, [])
    rows: list[dict[str, Any]] = []
    sampling = Passes(2 * batch)  # guidance runs each picture with and without its text
    start = now()

    def note(step: int, of: int, loss: float) -> None:
        took = since(start)
        rows.append({"s": took, "sampling_passes": sampling.count, "sampling_s": sampling.seconds, "loss": loss})
        sys.stderr.write(f"{method}, batch {batch}, step {step}: {json.dumps(rows[-1])}\n")
        if step > steps:
            raise Enough
        sampling.clear()
        start[:] = now()

    request = Request(subject="dog", action="ablate", target="cat", templates=TEMPLATES, seed=SEED)
    unet = editor.pipeline.unet
    hooks = [unet.register_forward_pre_hook(sampling.before), unet.register_forward_hook(sampling.after)]
    try:
        updater.watched(note).train(editor.backend, [request], location)
    except Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return rows[1:]


def quickfix(editor: Editor, runs: int) -> list[list[float]]:
    """One-concept edits, from a given target to weights written: [clock, processor] seconds of each."""
    out = []
    for _ in range(runs):
        start = now()
        editor.ablate("dog", target="cat", templates=TEMPLATES)
        out.append(since(start))
        editor.revert()
    return out


def measure(editor: Editor, method: str, batch: int, steps: int, runs: int) -> dict[str, Any]:
    """One method at one batch size, between quickfix edits."""
    edits = quickfix(editor, runs)
    rows = train(editor, method, batch, steps)
    edits += quickfix(editor, runs)
    out: dict[str, Any] = {"method": method, "batch": batch, "steps": rows, "load_average": os.getloadavg()}
    passes = sum(row["sampling_passes"] for row in rows)
    for i, kind in enumerate(("clock", "cpu")):
        rest = statistics.median(row["s"][i] - row["sampling_s"][i] for row in rows)
        one = sum(row["sampling_s"][i] for row in rows) / passes if passes else 0.0
        step = rest + (SAMPLING - 1) / 2 * one
        edit = statistics.median(edit[i] for edit in edits)
        out[kind] = {"quickfix_s": edit, "sampling_pass_s": one, "rest_s": rest, "step_s": step, "ratio": step / edit}
    out["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return out


def totals(found: dict[str, Any], denoising: float) -> list[dict[str, Any]]:
    """Extrapolated trainings, in processor time; each says what it assumes.

    Args:
        found: one `measure` result.
        denoising: processor seconds of one guided denoising step of one picture.
    """
    method, out = found["method"], []
    more = BATCH[method] / found["batch"]
    for source, steps in PUBLISHED[method]:
        assumed = f"{steps} steps ({source}) like those measured"
        if more != 1:
            assumed += f", each {more:g} times as long for the published batch of {BATCH[method]}"
        seconds = steps * more * found["cpu"]["step_s"]
        ratio = steps * more * found["cpu"]["ratio"]
        row: dict[str, Any] = {"steps": steps, "assumes": assumed, "cpu_seconds": seconds, "ratio": ratio}
        if method == "concept-ablation":
            row["preparation_cpu_s"] = ANCHORS * SAMPLING * denoising
            row["preparation_assumes"] = f"{ANCHORS} pictures of {SAMPLING} denoising steps; not in the ratio"
        out.append(row)
    return out


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| method | batch | measured step | by the clock | quickfix | a training assumes | it takes | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in results["cases"].values():
        cpu, clock = found["cpu"], found["clock"]
        for total in found["totals"]:
            cells = [found["method"], found["batch"], f"{cpu['step_s']:.0f} s", f"{clock['step_s']:.0f} s"]
            cells += [f"{1000 * cpu['quickfix_s']:.0f} ms", total["assumes"], f"{total['cpu_seconds'] / 3600:.1f} h"]
            lines.append("| " + " | ".join(map(str, [*cells, f"{total['ratio']:,.0f}"])) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing; write JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--runs", type=int, default=15, help="quickfix edits before and after each method")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.out / "training-step.json"
    results = json.loads(path.read_text()) if path.exists() else {"machine": machine(args.threads), "cases": {}}
    missing = [name for name in CASES if name not in results["cases"]]
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            pipe = pipeline(Path(folder))
        editor = Editor(pipe)
        results["parameters"] = {
            part: sum(p.numel() for p in getattr(pipe, part).parameters()) for part in ("unet", "text_encoder")
        }
        quickfix(editor, 3)  # warms up
        for name in missing:
            results["cases"][name] = measure(editor, *CASES[name], args.steps, args.runs)
            write_file(path, (json.dumps(results, indent=2) + "\n").encode(), overwrite=True)
    denoising = results["cases"]["esd, batch 1"]["cpu"]["sampling_pass_s"]
    for found in results["cases"].values():
        found["totals"] = totals(found, denoising)
    write_file(path, (json.dumps(results, indent=2) + "\n").encode(), overwrite=True)
    write_file(args.out / "training-step.md", table(results).encode(), overwrite=True)
    sys.stdout.write(table(results))


if __name__ == "__main__":
    main()
