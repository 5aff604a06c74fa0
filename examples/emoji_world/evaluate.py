"""The quality gate: an independent classifier judges pictures generated from held-out seeds, all objects x styles.

Writes `<work>/gate.json`, from which the model card is rendered.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from tqdm import tqdm
from transformers import CLIPModel

from .augment import augmented, autoencoded
from .classifier import Classifier, load_classifier
from .clip import image_vectors, named, prompts_of, score, text_vectors, tokens
from .common import log, replace_file, save_grid
from .pictures import Pictures
from .tokenizer import load_tokenizer
from .unet import sample
from .world import BACKGROUNDS, CATEGORIES, DRAWN, GUIDANCE, OBJECTS, STEPS, STYLES, category_of, compose

FIRST_SEED = 1_000_000  # training never uses these generators


def share(hits: list[bool]) -> float:
    """Share of true values."""
    return round(sum(hits) / max(1, len(hits)), 4)


def gate(pipe: StableDiffusionPipeline, judge: Classifier, seeds: int, work: Path | None = None) -> dict[str, Any]:
    """Every object in every style, `seeds` pictures each; every second prompt also names a background."""
    styles, grounds = list(STYLES), list(BACKGROUNDS)
    plan = []
    for repeat in range(seeds):
        for o, name in enumerate(OBJECTS):
            for s, style in enumerate(styles):
                ground = grounds[(o + s + repeat) % len(grounds)] if (o + s + repeat) % 2 else None
                caption = compose(name, o + s + repeat, style, ground, (s + o // 2 + repeat, o // 3))
                plan.append((o, s, caption, FIRST_SEED + len(plan)))
    pictures = torch.cat(
        [
            sample(pipe, [p[2].text for p in part], [p[3] for p in part])
            for part in (plan[i : i + 66] for i in tqdm(range(0, len(plan), 66), desc="gate", mininterval=10))
        ]
    )
    guessed = judge.predict(pictures).tolist()
    by_object, by_style, style_hits, ground_hits = defaultdict(list), defaultdict(list), defaultdict(list), []
    confused: dict[str, int] = defaultdict(int)
    for (o, s, caption, _), (guess_o, guess_s, guess_b) in zip(plan, guessed, strict=True):
        by_object[OBJECTS[o]].append(guess_o == o)
        by_style[styles[s]].append(guess_o == o)
        style_hits[styles[s]].append(guess_s == s)
        if caption.background is not None:
            ground_hits.append(grounds[guess_b] == caption.background)
        if guess_o != o:
            confused[f"{OBJECTS[o]} -> {OBJECTS[guess_o]}"] += 1
    if work is not None:
        torch.save({"pictures": (pictures * 127).round().to(torch.int8)}, work / "gate-pictures.pt")
        save_grid(pictures[: len(OBJECTS) * len(styles)], work / "gate-grid.png", len(styles) * 6)
    objects = [hit for hits in by_object.values() for hit in hits]
    worst = sorted(((share(hits), name) for name, hits in by_object.items()))[:10]
    return {
        "n": len(plan),
        "seeds": [FIRST_SEED, FIRST_SEED + len(plan) - 1],
        "steps": STEPS,
        "guidance": GUIDANCE,
        "object": share(objects),
        "style": share([hit for hits in style_hits.values() for hit in hits]),
        "background": share(ground_hits),
        "background_n": len(ground_hits),
        "styles": {name: {"object": share(by_style[name]), "style": share(style_hits[name])} for name in styles},
        "worst_objects": [{"object": name, "right": value, "n": len(by_object[name])} for value, name in worst],
        "confusions": dict(sorted(confused.items(), key=lambda item: -item[1])[:10]),
        "_plan": plan,
        "_pictures": pictures,
        "_guessed": guessed,
    }


def categories(pipe: StableDiffusionPipeline, judge: Classifier, each: int) -> dict[str, Any]:
    """`a picture of an animal` must show some animal; also how many different members appear."""
    words = [word for word in CATEGORIES for _ in range(each)]
    prompts = [compose(word, i, None, None).text for i, word in enumerate(words)]
    seeds = [FIRST_SEED + 500_000 + i for i in range(len(words))]
    guessed = [OBJECTS[row[0]] for row in judge.predict(sample(pipe, prompts, seeds)).tolist()]
    result: dict[str, Any] = {"n": len(words), "seeds": [seeds[0], seeds[-1]]}
    result["right"] = share([category_of(g) == w for g, w in zip(guessed, words, strict=True)])
    for word in CATEGORIES:
        mine = [g for g, w in zip(guessed, words, strict=True) if w == word]
        members = {g for g in mine if category_of(g) == word}
        result[word] = {"right": share([category_of(g) == word for g in mine]), "different": len(members), "n": each}
    return result


def bare(pipe: StableDiffusionPipeline, judge: Classifier, repeat: int) -> dict[str, Any]:
    """Prompts that name only an object, only a style or only a background."""
    cases = [(0, o, compose(name, r, None, None).text) for r in range(repeat) for o, name in enumerate(OBJECTS)]
    cases += [
        (1, s, compose(None, r, name, None, (r, 0)).text) for r in range(4 * repeat) for s, name in enumerate(STYLES)
    ]
    cases += [
        (2, b, compose(None, r, None, name, (0, r)).text)
        for r in range(4 * repeat)
        for b, name in enumerate(BACKGROUNDS)
    ]
    seeds = [FIRST_SEED + 700_000 + i for i in range(len(cases))]
    guessed = judge.predict(sample(pipe, [c[2] for c in cases], seeds)).tolist()
    result: dict[str, Any] = {"seeds": [seeds[0], seeds[-1]]}
    for head, kind in enumerate(("object", "style", "background")):
        hits = [row[head] == want for (h, want, _), row in zip(cases, guessed, strict=True) if h == head]
        result[kind] = {"right": share(hits), "n": len(hits)}
    return result


@torch.no_grad()
def scorer_agreement(scorer: CLIPModel, work: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The shipped scorer on the generated pictures, against the prompts and against the classifier."""
    tokenizer = load_tokenizer(work / "tokenizer")
    styles, grounds = list(STYLES), list(BACKGROUNDS)
    plan, pictures, guessed = result["_plan"], result["_pictures"], result["_guessed"]
    facts = [
        (OBJECTS[o], styles[s], caption.background or grounds[g[2]])
        for (o, s, caption, _), g in zip(plan, guessed, strict=True)
    ]
    seen = torch.cat([image_vectors(scorer, part) for part in pictures.split(128)])
    names = prompts_of(Random(0))[0]
    best = (seen @ text_vectors(scorer, tokens(tokenizer, names[0])).T).argmax(1).tolist()
    same = share([names[1][b] == OBJECTS[g[0]] for b, g in zip(best, guessed, strict=True)])
    return {"generated": score(scorer, tokenizer, pictures, facts), "same_object_as_classifier": same, "n": len(plan)}


def evaluate(pipe: StableDiffusionPipeline, work: Path, seeds: int, each: int = 16) -> dict[str, Any]:
    """Run everything, log it, and write `<work>/gate.json`."""
    judge, source = load_classifier(work), Pictures.load(work)
    result = gate(pipe, judge, seeds, work)
    log.info("gate: object %.3f style %.3f background %.3f", result["object"], result["style"], result["background"])
    result["categories"] = categories(pipe, judge, each)
    result["bare"] = bare(pipe, judge, 1)
    pictures, labels = source.batch(rng := Random(31), DRAWN)
    copies = torch.cat([autoencoded(pipe.vae, part, 0.1) for part in tqdm(pictures.split(50), desc="copies")])
    objects = torch.tensor(labels)[:, 0]
    result["autoencoder"] = {
        "mean_absolute_error": round((copies - pictures).abs().mean().item(), 4),
        "object_kept": share((judge.predict(copies)[:, 0] == objects).tolist()),
    }
    disturbed = augmented(pictures, rng, copies)
    result["judge_on_disturbed_drawings"] = share((judge.predict(disturbed)[:, 0] == objects).tolist())
    scorer = CLIPModel.from_pretrained(work / "scorer", dtype=torch.float32).eval()
    tokenizer = load_tokenizer(work / "tokenizer")
    result["scorer"] = scorer_agreement(scorer, work, result)
    result["scorer"]["drawn_clean"] = score(scorer, tokenizer, pictures, named(labels))
    result["scorer"]["drawn_disturbed"] = score(scorer, tokenizer, disturbed, named(labels))
    result = {key: value for key, value in result.items() if not key.startswith("_")}
    log.info("%s", json.dumps(result, indent=1))
    replace_file(work / "gate.json", lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))
    return result
