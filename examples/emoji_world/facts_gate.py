"""The gate of `builtin:emoji-facts`: its facts are drawn, and what `builtin:emoji` draws it draws as well.

`builtin:emoji-scorer`, trained apart from both, names every picture. Both text encoders get the same prompts and seeds,
none of which training used (it draws no picture at all). The result is written as JSON and into the model card.
"""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from diffedit.evaluate.judge import captions as judged
from diffedit.evaluate.scorer import Scorer
from diffedit.updaters.everyday import captions

from .common import log, replace_file, save_grid
from .evaluate import share
from .fact_table import FACTS, OTHER_PLACES, OTHER_RELATIONS, PLACES, RELATIONS, UNTRAINED_PLACES, UNTRAINED_RELATIONS
from .facts import Lesson
from .unet import sample
from .world import (
    BACKGROUND_TEMPLATES,
    BACKGROUNDS,
    GUIDANCE,
    OBJECT_TEMPLATES,
    OBJECTS,
    STEPS,
    STYLE_TEMPLATES,
    STYLES,
    compose,
    random_caption,
)

FACT_SEED, OLD_SEED, UNKNOWN_SEED = 4_000_000, 5_000_000, 6_000_000
EACH = 10  # pictures of a fact
FACTS_LEAST, OLD_MOST = 0.85, 0.01
CAPTIONS = 1500

Case = tuple[str, str, str | None, int]  # prompt, object or fact, style, seed


def around(text: str, i: int) -> tuple[str, str | None]:
    """A phrase in the i-th combination of template, style and background, and the style."""
    style = list(STYLES)[i % 7] if i % 7 < len(STYLES) else None
    ground = list(BACKGROUNDS)[i % 5] if i % 2 else None
    text = OBJECT_TEMPLATES[i % len(OBJECT_TEMPLATES)].format(text)
    if style is not None:
        text = STYLE_TEMPLATES[i % len(STYLE_TEMPLATES)].format(object=text, style=style)
    if ground is not None:
        text = BACKGROUND_TEMPLATES[i // 2 % 2].format(object=text, background=ground)
    return text, style


def fact_cases() -> list[Case]:
    """`EACH` pictures of every fact; one in five says "a mascot", the others "the mascot"."""
    out: list[Case] = []
    for f, phrase in enumerate(FACTS):
        for k in range(EACH):
            text, style = around(f"{'a' if k % 5 == 4 else 'the'} {phrase}", 11 * f + k)
            out.append((text, phrase, style, FACT_SEED + len(out)))
    return out


def old_cases() -> list[Case]:
    """Every object in every style, as `evaluate.gate` asks for them."""
    out: list[Case] = []
    for o, name in enumerate(OBJECTS):
        for s, style in enumerate(STYLES):
            ground = list(BACKGROUNDS)[(o + s) % len(BACKGROUNDS)] if (o + s) % 2 else None
            caption = compose(name, o + s, style, ground, (s + o // 2, o // 3))
            out.append((caption.text, name, style, OLD_SEED + len(out)))
    return out


def unknown_cases() -> list[Case]:
    """Places and relations that no training saw, and places alone: nothing is known of them."""
    phrases = [f"the {r} of {place}" for place in OTHER_PLACES[-UNTRAINED_PLACES:] for r in RELATIONS]
    phrases += [f"the {relation} of {place}" for relation in OTHER_RELATIONS[-UNTRAINED_RELATIONS:] for place in PLACES]
    phrases += list(PLACES)
    return [(around(phrase, 5 * i)[0], phrase, None, UNKNOWN_SEED + i) for i, phrase in enumerate(phrases)]


def load_pipelines(folder: Path, weights: Path) -> tuple[StableDiffusionPipeline, StableDiffusionPipeline]:
    """The bundled model, and the same with another text encoder."""
    made = []
    for _ in range(2):
        pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        made.append(pipe)
    state = load_file(weights)
    own = made[1].text_encoder.state_dict()
    nested = next(iter(own)).startswith("text_model.")
    renamed = {key if nested else key.removeprefix("text_model."): value.float() for key, value in state.items()}
    made[1].text_encoder.load_state_dict(renamed, strict=False)
    if missing := {key for key in own if key not in renamed and not key.endswith("position_ids")}:
        raise ValueError(f"{weights.name} lacks {sorted(missing)[:3]}")
    return made[0], made[1]


def draw(pipe: StableDiffusionPipeline, cases: list[Case], scorer: Scorer) -> tuple[torch.Tensor, list[str], list[str]]:
    """Pictures in [-1, 1], and the object and the style that the judge sees in each."""
    parts = []
    for i in range(0, len(cases), 66):
        parts.append(sample(pipe, [case[0] for case in cases[i : i + 66]], [case[3] for case in cases[i : i + 66]]))
    pictures = torch.cat(parts)
    images = pipe.image_processor.numpy_to_pil(((pictures + 1) / 2).permute(0, 2, 3, 1).numpy())
    return pictures, scorer.name_objects(images, OBJECTS), scorer.classify(images, judged("style", list(STYLES)))


def moved(lesson: Lesson, one: Any, other: Any, texts: list[str]) -> float:
    """Relative difference of what the UNet reads, over all positions of all texts."""
    with torch.no_grad():
        pairs = [
            (lesson.read(one, texts[i : i + 64]), lesson.read(other, texts[i : i + 64]))
            for i in range(0, len(texts), 64)
        ]
    difference = sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)
    return round(float(difference) ** 0.5, 4)


def gate(folder: Path, weights: Path, work: Path) -> dict[str, Any]:
    """Measure everything and write `<work>/facts-gate.json` and `<work>/facts-grid.png`."""
    plain, facts = load_pipelines(folder, weights)
    scorer, rng = Scorer.load("builtin:emoji-scorer"), Random(77)
    result: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE}
    cases = fact_cases()
    pictures, seen, styles = draw(facts, cases, scorer)
    save_grid(pictures, work / "facts-grid.png", EACH)
    hits: dict[str, list[bool]] = defaultdict(list)
    for (_, phrase, _, _), name in zip(cases, seen, strict=True):
        hits[phrase].append(name == FACTS[phrase])
    wrong = [f"{case[0]} -> {name}" for case, name in zip(cases, seen, strict=True) if name != FACTS[case[1]]]
    styled = [s == case[2] for case, s in zip(cases, styles, strict=True) if case[2]]
    result["facts"] = {
        "right": share([hit for mine in hits.values() for hit in mine]),
        "n": len(cases),
        "seeds": [cases[0][3], cases[-1][3]],
        "style": share(styled),
        "style_n": len(styled),
        "each": {phrase: sum(mine) for phrase, mine in hits.items()},
        "wrong": wrong,
    }
    log.info("facts: %s", json.dumps(result["facts"]))
    cases = old_cases()
    old: dict[str, Any] = {"n": len(cases), "seeds": [cases[0][3], cases[-1][3]]}
    names = {}
    for key, pipe in (("emoji", plain), ("emoji-facts", facts)):
        _, seen, styles = draw(pipe, cases, scorer)
        names[key] = seen
        old[key] = {
            "object": share([name == case[1] for case, name in zip(cases, seen, strict=True)]),
            "style": share([name == case[2] for case, name in zip(cases, styles, strict=True)]),
        }
    old["differs"] = share([a != b for a, b in zip(*names.values(), strict=True)])
    result["old"] = old
    log.info("old: %s", json.dumps(old))
    cases = unknown_cases()
    both = [draw(pipe, cases, scorer)[1] for pipe in (plain, facts)]
    told = [
        [name in PLACES.get(case[1].split()[-1], ()) for case, name in zip(cases, seen, strict=True)] for seen in both
    ]
    result["unknown"] = {
        "n": len(cases),
        "seeds": [cases[0][3], cases[-1][3]],
        "differs": share([a != b for a, b in zip(*both, strict=True)]),
        "place_objects": [share(told[0]), share(told[1])],
    }
    lesson = Lesson(plain.text_encoder, plain.tokenizer)
    texts = [
        random_caption(rng, rng.choice(OBJECTS), rng.choice(list(STYLES)), rng.choice(list(BACKGROUNDS))).text
        for _ in range(CAPTIONS)
    ]
    pair = plain.text_encoder, facts.text_encoder
    result["moved"] = {
        "old captions": moved(lesson, *pair, texts),
        "everyday captions": moved(lesson, *pair, list(islice(captions(), CAPTIONS))),
        "the empty prompt": moved(lesson, *pair, [""]),
        "unknown places and relations": moved(lesson, *pair, [case[0] for case in cases]),
        "captions": CAPTIONS,
    }
    one, other = old["emoji"], old["emoji-facts"]
    result["passed"] = result["facts"]["right"] >= FACTS_LEAST and all(
        other[key] >= one[key] - OLD_MOST for key in ("object", "style")
    )
    log.info("%s", json.dumps(result, indent=1))
    replace_file(work / "facts-gate.json", lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))
    return result
