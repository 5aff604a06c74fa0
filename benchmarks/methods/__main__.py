"""Command line of the benchmark of methods; see the package's text."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.logging import RichHandler

from benchmarks.methods import report
from benchmarks.methods.plan import BEFORE, PARTS, Cell, Record, Size, best, cells, estimate
from benchmarks.methods.scenes import model_styles
from benchmarks.methods.table import METHODS, Setting, available
from benchmarks.methods.work import Folder, work
from diffedit.evaluate.metrics import need

logger = logging.getLogger("benchmarks.methods")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    own = Size()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("--folder", type=Path, default=report.ROOT / "build" / "bench-methods", help="of the run")
    parser.add_argument(
        "--out", type=Path, default=report.ROOT / "docs", help="the documentation that the report is for"
    )
    parser.add_argument("--parts", "--kinds", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[], help="default: all that are installed")
    parser.add_argument("--images", type=int, default=own.images, help="pictures per measure and concept")
    parser.add_argument("--concepts", type=int, default=own.concepts, help="objects that quick methods are measured on")
    parser.add_argument("--slow-concepts", type=int, default=own.slow_concepts, help="the same for slow methods")
    parser.add_argument(
        "--slow-others", type=int, default=own.slow_others, help="styles, and colours, for slow methods"
    )
    parser.add_argument("--tuning-images", type=int, default=own.tuning_images)
    parser.add_argument("--tuning-concepts", type=int, default=own.tuning_concepts)
    parser.add_argument("--slow-tuning", type=int, default=own.slow_tuning, help="the same for slow methods")
    parser.add_argument("--counts", nargs="*", type=int, default=list(own.counts), help="objects edited at once")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--plan", action="store_true", help="tell what is missing, and do nothing")
    parser.add_argument("--report", action="store_true", help="write the pages from the published JSON, and do no more")
    parser.add_argument("--no-report", action="store_true", help="run, and leave the pages")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run what is missing, then publish."""
    args = arguments(given)
    logging.basicConfig(level=logging.INFO, handlers=[RichHandler(show_path=False)], format="%(message)s")
    logging.getLogger("diffedit").setLevel(logging.WARNING)
    need("scipy", "matplotlib")
    if args.report:
        report.write(args.out)
        return 0
    for name in sorted(set(args.methods or METHODS) - set(available(args.methods))):
        logger.warning("%s is left out: this installation has no such updater", name)
    if args.plan:
        tell_plan(args)
        return 0
    failed = run(args) if args.worker or args.workers == 1 else spread(args)
    if not args.worker and not args.no_report:
        folder = Folder(args.folder)
        done = folder.records()
        report.publish(folder, planned(args, done), chosen(args, done), args.out)
        report.write(args.out)
    return failed


def size(args: argparse.Namespace) -> Size:
    """How much is measured."""
    names = ("images", "concepts", "slow_concepts", "slow_others", "tuning_images", "tuning_concepts", "slow_tuning")
    return Size(**{name: getattr(args, name) for name in names}, counts=tuple(args.counts))


def planned(args: argparse.Namespace, done: dict[str, Record]) -> list[Cell]:
    """The cells that are known by now."""
    return cells(available(args.methods), model_styles(), size(args), args.parts, done)


def chosen(args: argparse.Namespace, done: dict[str, Record]) -> dict[str, Setting]:
    """The setting that tuning chose, for each method that is tuned."""
    found = {name: best(name, method, size(args), done) for name, method in available(args.methods).items()}
    return {name: setting for name, setting in found.items() if setting is not None}


def tell_plan(args: argparse.Namespace) -> None:
    """A table of what is missing."""
    folder = Folder(args.folder)
    left = [cell for cell in planned(args, folder.records()) if not folder.finished(cell)]
    count: Counter[tuple[str, str]] = Counter()
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for cell in left:
        key = cell.part, cell.method or BEFORE
        count[key] += 1
        seconds[key] += estimate(cell, METHODS.get(cell.method))
    lines = [
        f"{part:8} {name:24} {count[part, name]:5} cells {seconds[part, name] / 60:7.1f} min" for part, name in count
    ]
    for part in dict.fromkeys(part for part, _ in count):
        mine = [key for key in count if key[0] == part]
        lines.append(
            f"{part:8} {'all':24} {sum(count[k] for k in mine):5} cells {sum(seconds[k] for k in mine) / 60:7.1f} min"
        )
    total = sum(seconds.values()) / 60
    lines.append(
        f"{len(left)} cells are missing: about {total:.0f} minutes of one core, {total / 2:.0f} with two workers"
    )
    lines.append("Settings that tuning finds better than the default add cells once a method is tuned.")
    sys.stdout.write("\n".join(lines) + "\n")


def run(args: argparse.Namespace) -> int:
    """Work in this process until nothing is left."""
    import torch

    from benchmarks.methods.cost import runner
    from benchmarks.methods.measure import World

    torch.set_num_threads(1)
    folder, parent = Folder(args.folder), os.getppid()
    world = runner(World(args.folder))

    def told(cell: Cell, seconds: float, left: int) -> None:
        logger.info("%6.1f s  %s, %d left", seconds, cell.key, left)

    orphaned = (lambda: os.getppid() != parent) if args.worker else (lambda: False)
    failed = work(folder, lambda done: planned(args, done), world, told=told, stop=orphaned)
    for cell, error in failed:
        logger.error("%s failed", cell.key, exc_info=error)
    return 1 if failed else 0


def spread(args: argparse.Namespace) -> int:
    """Several such processes, one thread each."""
    command = [sys.executable, "-m", "benchmarks.methods", *sys.argv[1:], "--worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen(command, env=environment, cwd=report.ROOT) for _ in range(args.workers)]
    try:
        return int(any([worker.wait() for worker in workers]))
    except KeyboardInterrupt:
        for worker in workers:
            worker.send_signal(signal.SIGINT)
        for worker in workers:
            worker.wait()
        return 130


if __name__ == "__main__":
    sys.exit(main())
