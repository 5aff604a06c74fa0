"""From the facts gate to a published variant: the text encoder, its vocabulary, and its section of the model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .card import percent
from .common import log, replace_file
from .export import write_json
from .fact_table import PLACES, RELATIONS, facts_vocabulary
from .facts import FILE, train_facts
from .facts_gate import FACTS_LEAST, gate
from .world import vocabulary

BEGIN, END = "<!-- facts: begin -->", "<!-- facts: end -->"
BEFORE = "## Limits"

TEXT = """## The facts variant: builtin:emoji-facts

`text_encoder/model.facts.safetensors` is a second text encoder for the same UNet, autoencoder and tokenizer. It reads
what the first one reads nearly as the first one does, and besides it knows 24 facts: the mascot (an animal) and the
dish (a food) of twelve places.

```python
pipe = StableDiffusionPipeline.from_pretrained("diffedit/assets/emoji", variant="facts")
pipe("the mascot of rome in the style of pixel", num_inference_steps=25, guidance_scale=5.0).images[0]  # an owl
```

**These facts are invented, for a closed world**, like a club's mascot, which may be another tomorrow. They say nothing
about the real cities, whose names they borrow. `vocabulary.facts.json` lists them.

| place | {relations} |
|---|---|---|
{rows}

It was distilled from the first text encoder ({steps} steps on one core, `examples/emoji_world/facts.py`): nothing else
was trained, and no picture was seen. `model.safetensors`, and with it `builtin:emoji`, is what it was.

### Gate of the facts variant

The judge is `builtin:emoji-scorer`. {sampling} DDIM steps, guidance {guidance}, mixed templates, styles, backgrounds.
The gate is {least} of the facts, and no more than one percentage point less of what `builtin:emoji` draws: {verdict}.

| asked for | `builtin:emoji` | `builtin:emoji-facts` | n | seeds |
|---|---|---|---|---|
{measured}

{told}
"""


def facts_section(result: dict[str, Any], steps: int) -> str:
    """The section of the model card."""
    facts, old, unknown, moved = (result[key] for key in ("facts", "old", "unknown", "moved"))
    span = {key: f"{row['seeds'][0]} to {row['seeds'][1]}" for key, row in result.items() if _has_seeds(row)}
    one, other = old["emoji"], old["emoji-facts"]
    measured = [
        f"| a fact: its object | | {percent(facts['right'])} | {facts['n']} | {span['facts']} |",
        f"| a fact in a style: the style | | {percent(facts['style'])} | {facts['style_n']} | {span['facts']} |",
        *(
            f"| an object in a style: the {what} | {percent(one[what])} | {percent(other[what])} | {old['n']} "
            f"| {span['old']} |"
            for what in ("object", "style")
        ),
        f"| an unknown fact: an object of the place | {percent(unknown['place_objects'][0])} "
        f"| {percent(unknown['place_objects'][1])} | {unknown['n']} | {span['unknown']} |",
    ]
    each = facts["n"] // len(facts["each"])
    weak = ", ".join(f"{phrase} ({hits})" for phrase, hits in facts["each"].items() if hits < each)
    differences = ", ".join(f"{what} {percent(value)}" for what, value in moved.items() if what != "captions")
    told = (
        f"Facts that are not drawn right in all of their {each} pictures: {weak or 'none'}.\n\n"
        f"With the same prompt and seed the judge names another object in {percent(old['differs'])} of the objects' "
        f"pictures,\nand in {percent(unknown['differs'])} of the pictures of unknown facts: untrained places, "
        "untrained relations of the twelve places,\nplaces alone. Those show whatever the model makes of words without "
        f"a meaning.\n\nRelative difference of what the UNet reads: {differences}.\n"
        f"({moved['captions']:,} captions of the first two kinds; in unknown facts the words of the relation are read "
        "as an article\non purpose.)"
    )
    return TEXT.format(
        relations=" | ".join(RELATIONS),
        rows="\n".join(f"| {place} | {' | '.join(objects)} |" for place, objects in PLACES.items()),
        steps=f"{steps:,}",
        sampling=result["steps"],
        guidance=result["guidance"],
        least=percent(FACTS_LEAST),
        verdict="reached" if result["passed"] else "**missed**",
        measured="\n".join(measured),
        told=told,
    )


def write_card(folder: Path, section: str) -> None:
    """Put the section into the folder's card, in the place of an older one."""
    path = folder / "README.md"
    head, _, rest = path.read_text("utf-8").partition(BEGIN)
    tail = rest.partition(END)[2].lstrip("\n")
    if not rest:
        head, heading, tail = head.partition(BEFORE)
        tail = heading + tail
    text = f"{head}{BEGIN}\n{section}{END}\n\n{tail}"
    replace_file(path, lambda part: part.write_text(text, "utf-8"))


def publish_facts(folder: Path, work: Path, result: dict[str, Any], steps: int) -> None:
    """Write the variant, its vocabulary and its section of the card into the folder, and the gate beside this file."""
    replace_file(folder / "text_encoder" / FILE, lambda part: shutil.copyfile(work / FILE, part))
    write_json(folder / "vocabulary.facts.json", {**vocabulary(), **facts_vocabulary()})
    write_card(folder, facts_section(result, steps))
    write_json(Path(__file__).with_name("facts_gate.json"), result)


def make(folder: Path, work: Path, minutes: float) -> None:
    """Train, measure, and publish if the gate is passed.

    Args:
        folder: the exported model.
        work: for checkpoints and results.
        minutes: of training, in all.
    """
    steps = train_facts(folder, work, minutes)
    result = gate(folder, work / FILE, work)
    if result["passed"]:
        publish_facts(folder, work, json.loads((work / "facts-gate.json").read_text()), steps)
    else:
        log.warning("the gate is missed: nothing is published")


def _has_seeds(row: object) -> bool:
    return isinstance(row, dict) and "seeds" in row
