"""Do the other closed forms and `refact` work at all on the bundled model? A few pictures each, no comparison.

    python -m benchmarks.closed_forms

Per method three objects are ablated one at a time. Counted: pictures of the object in which the judge still sees it
(two prompts x `SEEDS`), and pictures of six other objects in which it sees those (one prompt x the first seed), each
also for the unedited model. One JSON per method in `docs/results/closed-forms/`; what is there is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffedit import Editor
from diffedit.evaluate.scorer import Scorer
from diffedit.locators.text_mlp import TextMLPLocator
from diffedit.text import with_article
from diffedit.updaters.cross_attention import TIME, UCE, LocoEdit
from diffedit.updaters.rank_one import ReFACT

OUT = Path(__file__).parents[1] / "docs" / "results" / "closed-forms"
OBJECTS = ("dog", "guitar", "castle")
OTHERS = ("cat", "fox", "banana", "piano", "rabbit", "hammer")
SEEDS = (700_000, 700_001, 700_002)
METHODS: dict[str, dict[str, Any]] = {
    "unedited": {},
    "time": {"updater": TIME()},
    "uce": {"updater": UCE()},
    "uce-none": {"updater": UCE(), "preserve": []},
    "uce-every": {"updater": UCE(pairing="every", prompts="request")},
    "locoedit": {"updater": LocoEdit()},
    "refact": {"updater": ReFACT(learning_rate=0.2), "locator": TextMLPLocator(layer=0)},
    "quickfix": {"updater": "quickfix"},
}


def count(editor: Editor, scorer: Scorer, wanted: Sequence[tuple[str, str, int]]) -> list[int]:
    """[pictures in which the judge sees the name, pictures] for (name, prompt, seed)."""
    images = editor.generate_pairs([(prompt, seed) for _, prompt, seed in wanted], batch_size=24)
    seen = scorer.name_objects(images, editor.vocabulary.objects)
    return [sum(name == found for (name, *_), found in zip(wanted, seen, strict=True)), len(wanted)]


def measure(editor: Editor, scorer: Scorer, settings: dict[str, Any]) -> dict[str, Any]:
    """One method on every object."""
    found: dict[str, Any] = {}
    for name in OBJECTS:
        start = time.perf_counter()
        edit = editor.ablate(name, **settings) if settings else None
        seconds = time.perf_counter() - start
        article = with_article(name)
        own = [(name, p, s) for p in (f"a picture of {article}", f"{article} in the style of twemoji") for s in SEEDS]
        rest = [(other, f"a picture of {with_article(other)}", SEEDS[0]) for other in OTHERS]
        found[name] = {
            "subject": count(editor, scorer, own),
            "others": count(editor, scorer, rest),
            "seconds": round(seconds, 2),
            "target": edit.requests[0].target if edit else None,
            "sites": len(edit.delta.sites) if edit else 0,
        }
        editor.revert()
    return found


def main() -> None:
    """Measure what is missing."""
    OUT.mkdir(parents=True, exist_ok=True)
    editor, scorer = Editor("builtin:emoji"), Scorer.load("builtin:emoji-scorer")
    for method, settings in METHODS.items():
        path = OUT / f"{method}.json"
        if not path.exists():
            record = {"method": method, "seeds": SEEDS, "objects": measure(editor, scorer, settings)}
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
