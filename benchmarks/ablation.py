"""How well does an ablation work on the bundled model, and what does it cost the others?

For each subject: `--images` pictures of the subject after `Editor("builtin:emoji").ablate(subject)` with its automatic
target, and `--per-other` pictures of every other object, before and after, at the same seeds. `builtin:emoji-scorer`,
which was trained apart from the model, names the object in each picture among all objects.

    python -m benchmarks.ablation --out docs/results

Interrupted runs resume: a subject whose numbers are in the output folder is not run again. The seeds start at
`--first-seed`, far from any seed used while the edit's defaults were chosen.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.logging import RichHandler
from rich.progress import track
from scipy.stats import binomtest

from diffedit import Editor
from diffedit.evaluate.scorer import Scorer
from diffedit.io.folder import write_file
from diffedit.text import with_article

CONTEXTS = ("{}", "a picture of {}", "an icon of {}")
logger = logging.getLogger("benchmarks.ablation")


def prompts_for(name: str, editor: Editor) -> list[str]:
    """The prompts that a subject is drawn with: bare, two frames, every style, every background."""
    phrase = with_article(name)
    vocabulary = editor.vocabulary
    out = [context.format(phrase) for context in CONTEXTS]
    out += [f"{phrase} in the style of {style}" for style in vocabulary.styles]
    out += [f"{phrase} on a {colour} background" for colour in vocabulary.backgrounds]
    return out


def draw(editor: Editor, names: Sequence[str], count: int, first_seed: int) -> dict[str, list[Any]]:
    """`count` pictures of each object, cycling through its prompts, every picture with a seed of its own."""
    out = {}
    for name in names:
        prompts = prompts_for(name, editor)
        jobs = [(prompts[i % len(prompts)], first_seed + i) for i in range(count)]
        out[name] = editor.generate_pairs(jobs, batch_size=50)
    return out


def proportion(hits: int, n: int) -> dict[str, float]:
    """A share with its exact (Clopper-Pearson) 95% interval."""
    interval = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="exact")
    return {"hits": hits, "n": n, "share": hits / n, "low": interval.low, "high": interval.high}


def recognised(scorer: Scorer, pictures: dict[str, list[Any]], objects: Sequence[str]) -> dict[str, list[bool]]:
    """Per object, whether each of its pictures is named as that object."""
    return {name: [seen == name for seen in scorer.name_objects(images, objects)] for name, images in pictures.items()}


def main() -> None:
    """Run the measurement and write one JSON per subject and a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--subjects", nargs="*", help="default: every object of the vocabulary")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--per-other", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=900_000)
    parser.add_argument("--updater", default="quickfix")
    parser.add_argument(
        "--preserve",
        choices=["all", "half", "none"],
        default="all",
        help="half: preserve every second of the other objects and measure the rest, which nothing protects",
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, handlers=[RichHandler()], format="%(message)s")

    editor, scorer = Editor("builtin:emoji"), Scorer.load("builtin:emoji-scorer")
    objects = editor.vocabulary.objects
    title = f"ablation-{args.updater}" + ("" if args.preserve == "all" else f"-{args.preserve}")
    cases = args.out / title
    cases.mkdir(parents=True, exist_ok=True)
    before: dict[str, list[bool]] | None = None
    for subject in track(args.subjects or objects, description="subjects"):
        path = cases / f"{subject.replace(' ', '-')}.json"
        if path.exists():
            continue
        if before is None:
            logger.info("drawing every object before any edit")
            before = recognised(scorer, draw(editor, objects, args.per_other, args.first_seed), objects)
        others = [name for name in objects if name != subject]
        fresh = recognised(scorer, draw(editor, [subject], args.images, args.first_seed), objects)[subject]
        preserve, others = {"all": (None, others), "half": (others[::2], others[1::2]), "none": ([], others)}[
            args.preserve
        ]
        edit = editor.ablate(subject, updater=args.updater, preserve=preserve)
        seen = scorer.name_objects(draw(editor, [subject], args.images, args.first_seed)[subject], objects)
        after = recognised(scorer, draw(editor, others, args.per_other, args.first_seed), objects)
        editor.revert()
        result = {
            "subject": subject,
            "target": edit.requests[0].target,
            "updater": edit.manifest.updater.model_dump(mode="json"),
            "relative_norm": edit.manifest.sites[0].relative_norm,
            "bytes": sum(len(data) for data in edit.files().values()),
            "before": proportion(sum(fresh), args.images),
            "left": proportion(sum(name == subject for name in seen), args.images),
            "became": Counter(seen).most_common(4),
            "others_before": proportion(sum(sum(before[name]) for name in others), len(others) * args.per_other),
            "others_after": proportion(sum(sum(hits) for hits in after.values()), len(others) * args.per_other),
            "others_lost": sorted({n for n in others for a, b in zip(before[n], after[n], strict=True) if a and not b}),
            "seeds": [args.first_seed, args.first_seed + args.images - 1],
        }
        write_file(path, json.dumps(result, indent=2).encode(), overwrite=True)
        logger.info("%s -> %s: left %d of %d", subject, result["target"], result["left"]["hits"], args.images)
    summarise(cases, args.out / f"{title}.md")


def summarise(cases: Path, out: Path) -> None:
    """The table of `docs/results.md`, from the JSON files alone."""
    rows = [json.loads(path.read_text()) for path in sorted(cases.glob("*.json"))]
    head = (
        "subject",
        "target",
        "became",
        "recognised before",
        "left after",
        "gone, 95%",
        "others before",
        "others after",
        "kept",
        "lost in a picture",
    )
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        left, first, last = row["left"], row["others_before"], row["others_after"]
        cells = (
            row["subject"],
            row["target"],
            ", ".join(f"{name} {count}" for name, count in row["became"][:2]),
            f"{row['before']['share']:.0%}",
            f"{left['hits']} of {left['n']}",
            f"{1 - left['high']:.0%} to {1 - left['low']:.0%}",
            f"{first['share']:.1%}",
            f"{last['share']:.1%}",
            f"{last['share'] / first['share']:.1%}",
            ", ".join(row["others_lost"]) or "none",
        )
        lines.append(f"| {' | '.join(cells)} |")
    passed = sum(_passed(row) for row in rows)
    lines += ["", f"{passed} of {len(rows)} subjects: gone in at least 90% of the pictures, others keep at least 95%."]
    write_file(out, ("\n".join(lines) + "\n").encode(), overwrite=True)


def _passed(row: dict[str, Any]) -> bool:
    kept = row["others_after"]["share"] / row["others_before"]["share"]
    return bool(row["left"]["share"] <= 0.10 and kept >= 0.95)


if __name__ == "__main__":
    main()
