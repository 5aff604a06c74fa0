"""Does an ablation reach the subject's other names, and what does it cost to name them?

For each subject and each `expand` setting: are pictures of the subject, its plural, its other spellings and its
misspellings still recognised as the subject (`builtin:emoji-scorer`), and do pictures of the other objects stay what
they were? Beside that the processor seconds of the edit (median of five) and the bytes of its folder.

    python -m benchmarks.other_names --out docs/results

The same prompts and seeds in every setting. A group that the unedited model does not draw as the subject says nothing
about the edit; its share before the edit is in the table for that.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, get_args

from rich.logging import RichHandler

from benchmarks.ablation import CONTEXTS, proportion
from diffedit import Editor
from diffedit.aliases import Expand, expand
from diffedit.evaluate.scorer import Scorer
from diffedit.io.folder import write_file
from diffedit.text import with_article

SUBJECTS = ("dog", "butterfly", "crystal ball", "horse")
SPELLINGS = ("with hyphens", "with spaces", "as one word")
logger = logging.getLogger("benchmarks.other_names")


def groups(subject: str) -> dict[str, list[str]]:
    """What the subject is called, as it stands after "a picture of", by kind of name."""
    found = expand(subject, "all").aliases
    return {
        "subject": [with_article(subject)],
        "plural": [alias.name for alias in found if alias.reason == "plural"],
        "spelling": [with_article(alias.name) for alias in found if alias.reason in SPELLINGS],
        "misspelling": [with_article(alias.name) for alias in found if alias.reason.startswith("misspelt")],
    }


def draw(editor: Editor, names: Sequence[str], count: int, first_seed: int) -> list[Any]:
    """`count` pictures, through the names in turn and then through the contexts, each with a seed of its own."""
    pairs = []
    for i in range(count):
        context = CONTEXTS[i // len(names) % len(CONTEXTS)]
        pairs.append((context.format(names[i % len(names)]), first_seed + i))
    return editor.generate_pairs(pairs, batch_size=12)


def main() -> None:
    """Run the measurement and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--images", type=int, default=12, help="pictures of each group in each setting")
    parser.add_argument("--others", type=int, default=22, help="other objects, one picture each")
    parser.add_argument("--first-seed", type=int, default=980_000)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])
    logging.getLogger("diffedit").setLevel(logging.WARNING)
    editor, scorer = Editor("builtin:emoji"), Scorer.load()
    objects = editor.vocabulary.objects
    editor.ablate("dog").revert()  # what is set up once is not a cost of an edit

    def hits(names: Sequence[str], wanted: Sequence[str]) -> list[bool]:
        pictures = draw(editor, names, len(wanted), options.first_seed)
        return [seen == name for seen, name in zip(scorer.name_objects(pictures, objects), wanted, strict=True)]

    rows: list[dict[str, Any]] = []
    for subject in SUBJECTS:
        others = [name for name in objects if name != subject]
        others = [others[i * len(others) // options.others] for i in range(options.others)]
        frames = [with_article(name) for name in others]
        kinds = {kind: names for kind, names in groups(subject).items() if names}
        before = {kind: hits(names, [subject] * options.images) for kind, names in kinds.items()}
        kept_before = hits(frames, others)
        for how in ("before", *get_args(Expand)):
            row: dict[str, Any] = {"subject": subject, "expand": how}
            if how != "before":
                seconds = []
                for _ in range(5):
                    start = time.process_time()
                    edit = editor.ablate(subject, expand=how)
                    seconds.append(time.process_time() - start)
                    editor.revert()
                editor.load(edit)
                row |= {
                    "aliases": edit.requests[0].aliases,
                    "target": edit.requests[0].target,
                    "seconds": median(seconds),
                    "bytes": sum(len(data) for data in edit.files().values()),
                    "rank": edit.manifest.sites[0].rank,
                }
            shown = before if how == "before" else {k: hits(n, [subject] * options.images) for k, n in kinds.items()}
            kept = kept_before if how == "before" else hits(frames, others)
            row["shown"] = {kind: proportion(sum(seen), len(seen)) for kind, seen in shown.items()}
            both = [now for now, was in zip(kept, kept_before, strict=True) if was]
            row["others_kept"] = proportion(sum(both), len(both))
            rows.append(row)
            editor.revert()
            logger.info("%s, %s: %s", subject, how, {kind: rate["hits"] for kind, rate in row["shown"].items()})
    document = {"first_seed": options.first_seed, "images": options.images, "others": options.others, "rows": rows}
    write_file(options.out / "other-names.json", (json.dumps(document, indent=1) + "\n").encode(), overwrite=True)


if __name__ == "__main__":
    main()
