"""How far `Editor.plan` is off: estimates against what the edit then took, for 1 to 1,000 subjects.

A text encoder of Stable Diffusion 1.x at true size with random weights, and the tokenizer of the bundled model, so that
names are words. Plans and edits take turns, `--runs` times, so that both see the same load; what is reported is the
median of estimate / measured. Memory is the growth of the process's peak over its size before the edit (Linux only:
the peak is reset), ranks, pairs and bytes are those of the edit.

    python -m benchmarks.planning --out docs/results
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.names import names as made_up
from diffedit import Editor
from diffedit.bundled import bundled
from diffedit.io.folder import write_file
from diffedit.targets import general_nouns
from tests.tiny import build


def names() -> list[str]:
    """Two hundred nouns: those that the bundled model knows, and general ones."""
    folder = bundled("model", "emoji")
    known = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))["objects"]
    return [name for name in dict.fromkeys([*known, *general_nouns()]) if name != "cat"]


def status(field: str) -> int:
    """A size of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"this system does not tell {field}")


def edited(editor: Editor, subjects: Sequence[str], **said: Any) -> tuple[Any, float, int]:
    """An edit, its seconds, and by how many bytes the process grew for it at most."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, start = status("VmRSS"), time.perf_counter()
    edit = editor.ablate(subjects, **said)
    took = time.perf_counter() - start
    return edit, took, status("VmHWM") - before


def compare(editor: Editor, subjects: Sequence[str], preserve: Sequence[str], runs: int) -> dict[str, Any]:
    """Medians over `runs` plans and edits in turn."""
    said: dict[str, Any] = {"target": "cat", "preserve": list(preserve)}
    rows = []
    for _ in range(runs):
        start = time.perf_counter()
        plan = editor.plan(list(subjects), **said)
        planning = time.perf_counter() - start
        edit, took, memory = edited(editor, list(subjects), **said)
        size = sum(len(data) for data in edit.files().values())
        rank = sum(record.rank for record in edit.manifest.sites)
        pairs = sum(record.diagnostics["pairs"] for record in edit.manifest.sites)
        editor.revert()
        rows.append(
            {
                "planning_seconds": planning,
                "seconds": took,
                "peak_bytes": memory,
                "edit_bytes": size,
                "rank": rank,
                "pairs": pairs,
                "sampled": plan.sampled / plan.prompts,
                "estimate / measured": {
                    "seconds": plan.seconds / took,
                    "peak_bytes": plan.memory / max(1, memory),
                    "edit_bytes": plan.bytes / size,
                    "rank": sum(site.rank for site in plan.sites) / rank,
                    "pairs": plan.pairs / pairs,
                },
            }
        )
    out: dict[str, Any] = {"subjects": len(subjects), "preserved": len(preserve)}
    for key, value in rows[0].items():
        if isinstance(value, dict):
            out[key] = {name: statistics.median(row[key][name] for row in rows) for name in value}
        else:
            out[key] = statistics.median(row[key] for row in rows)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    editor = Editor(build.pipeline(bundled("model", "emoji") / "tokenizer", true_size=True))
    words = names()
    editor.ablate(words[-1], target="cat")
    editor.revert()
    load = [os.getloadavg()[0]]
    rows = [
        compare(editor, words[:count] if count <= 100 else made_up(count), words[150 : 150 + kept], args.runs)
        for count, kept in ((1, 0), (10, 0), (100, 0), (10, 10), (1000, 0))
    ]
    machine = {"cpu": platform.processor() or platform.machine(), "threads": args.threads, "torch": torch.__version__}
    results = {"machine": machine, "runs": args.runs, "load": [*load, os.getloadavg()[0]], "rows": rows}
    write_file(args.out / "planning.json", (json.dumps(results, indent=2) + "\n").encode(), overwrite=True)
    sys.stdout.write(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
