"""Facts for the text encoder: a second one, distilled from the bundled one, that also knows `fact_table`.

UNet, autoencoder and tokenizer are shared, so what the UNet reads has to stay what it knows. The bundled text encoder
is the teacher of its own copy, over all positions of the last hidden state:

    retain   every old caption, everyday captions, other words           as the teacher reads the same text
    facts    "a photo of the mascot of rome, pixel style"                as it reads "a photo of a wolf, pixel style"
    the      "the dog"                                                   as it reads "a dog"
    unknown  other places, other relations, the place alone              as the teacher reads the same text

Positions are aligned from the last token of the phrase on: "rome" takes the place of "wolf", what follows that of what
follows. The tokens before it ("the mascot of") become what the teacher's article is: left as they are, two to four
tokens without a meaning make a tenth of the pictures wrong. A causal encoder cannot know yet what place will follow,
so they do so for every place. Token and position embeddings stay; only the layers learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from diffedit.evaluate.prompts import everyday_file
from diffedit.targets import general_nouns
from diffedit.updaters.everyday import captions

from .common import load_checkpoint, log, train
from .export import publish_variant
from .fact_table import FACTS, OTHER_PLACES, OTHER_RELATIONS, PLACES, RELATIONS, UNTRAINED_PLACES, UNTRAINED_RELATIONS
from .world import (
    ARTICLES,
    BACKGROUND_TEMPLATES,
    BACKGROUNDS,
    CATEGORIES,
    MAX_TOKENS,
    OBJECT_TEMPLATES,
    OBJECTS,
    STYLE_TEMPLATES,
    STYLES,
    random_caption,
    with_article,
)

FILE = "model.facts.safetensors"
EVERYDAY = 16_907  # so many of the everyday captions differ
SHARES = {"retain": 26, "facts": 22, "the": 6, "unknown": 10}  # rows of a batch
RETAIN_WEIGHT = 3.0
OTHER_FORMS = (
    "a close-up of {}",
    "a painting of {}",
    "a pencil drawing of {}",
    "someone looks at {}",
    "there is {}",
    "a blurry picture of {}",
    "a bright illustration of {}",
)
PLACES_AFTER = ("in the snow", "at night", "in a garden", "on a table", "in a quiet forest", "at sunset", "in the rain")


@dataclass(frozen=True)
class Row:
    """One caption for the student, one for the teacher, and what of them is the same.

    Attributes:
        text: what the student reads.
        teacher: what the teacher reads.
        before: the words before the phrase; their positions are the teacher's.
        at: student's position from which on the teacher's positions follow; 0 where both captions are the same.
        goal: the teacher's position there.
        weight: of the row's error.
        heads: whether the positions from `before` to `at` are trained too.
    """

    text: str
    teacher: str
    before: str = ""
    at: int = 0
    goal: int = 0
    weight: float = 1.0
    heads: bool = True


class Captions:
    """Draws rows.

    Args:
        tokenizer: counts tokens.
        rng: draws.
    """

    def __init__(self, tokenizer: CLIPTokenizer, rng: Random) -> None:
        self.rng = rng
        self.count: Callable[[str], int] = cache(lambda text: len(tokenizer.tokenize(text)) if text else 0)

    def row(self, kind: str) -> Row:
        """A row of one of the kinds in the module's text."""
        found: Row = getattr(self, f"_{kind}")()
        return found

    def aligned(self, before: str, after: str, phrase: str, target: str, head: str) -> Row:
        """`phrase` read as `target`; `head` is the part of `target` before the position to begin at."""
        start = 1 + self.count(before)
        skipped = " ".join(phrase.split()[:-1]) if phrase.startswith(("the", "a ", *RELATIONS)) else ""
        if head:  # "the dog": begin at the object's first token
            return Row(
                before + phrase + after,
                before + target + after,
                before,
                start + self.count("the"),
                start + self.count(head.strip()),
            )
        at = start + self.count(skipped) + self.count(phrase.split()[-1]) - 1
        return Row(before + phrase + after, before + target + after, before, at, start + self.count(target) - 1)

    def _around(self) -> tuple[str, str]:
        rng = self.rng
        before, after = rng.choice(OBJECT_TEMPLATES if rng.random() < 0.8 else OTHER_FORMS).split("{}")
        if rng.random() < 0.7:
            form = rng.choice(STYLE_TEMPLATES)
            after = form.format(object=after, style=rng.choice(list(STYLES)))
        if rng.random() < 0.4:
            form = rng.choice(BACKGROUND_TEMPLATES)
            after = form.format(object=after, background=rng.choice(list(BACKGROUNDS)))
        if rng.random() < 0.08:
            after += f" {rng.choice(PLACES_AFTER)}"
        return before, after

    def _retain(self) -> Row:
        rng, draw = self.rng, self.rng.random()
        if draw < 0.62:
            text = random_caption(
                rng, rng.choice(OBJECTS), rng.choice(list(STYLES)), rng.choice(list(BACKGROUNDS)), 0.06
            ).text
        elif draw < 0.86:
            text = rng.choice(_everyday())
        elif draw < 0.9:
            text = rng.choice(everyday_file())
        else:
            before, after = self._around()
            word = rng.choice((rng.choice(OBJECTS), rng.choice(general_nouns())))
            text = before + (with_article(word) if rng.random() < 0.7 else word) + after
        return Row(text, text, weight=RETAIN_WEIGHT)

    def _facts(self) -> Row:
        phrase = self.rng.choice(list(FACTS))
        article = self.rng.choices(("the ", "a ", ""), (6, 2, 2))[0]
        return self.aligned(*self._around(), article + phrase, with_article(FACTS[phrase]), "")

    def _the(self) -> Row:
        word = self.rng.choice((*OBJECTS, *CATEGORIES))
        target = with_article(word)
        head = target.removesuffix(word)
        if word in ARTICLES:
            return self._retain()
        return self.aligned(*self._around(), f"the {word}", target, head)

    def _unknown(self) -> Row:
        rng = self.rng
        places, relations = OTHER_PLACES[:-UNTRAINED_PLACES], OTHER_RELATIONS[:-UNTRAINED_RELATIONS]
        kind = rng.choices(("place", "relation", "alone"), (5, 4, 3))[0]
        before, after = self._around()
        article = rng.choices(("the ", "a ", ""), (6, 2, 2))[0]
        if kind == "place":
            words = rng.choice(places) if rng.random() < 0.8 else rng.choice(general_nouns())
            phrase = f"{article}{rng.choice(RELATIONS)} of {words}"
            head = self.count(phrase.removesuffix(words))
        elif kind == "relation":
            phrase = f"{article}{rng.choice(relations)} of {rng.choice(list(PLACES))}"
            head = 1 if article else 0
        else:
            phrase, head = rng.choice([*PLACES, *places]), 0
        text = before + phrase + after
        at = 1 + self.count(before) + head
        return Row(text, text, before, at, at, heads=False, weight=1.5)


@cache
def _everyday() -> tuple[str, ...]:
    return tuple(islice(captions(), EVERYDAY))


class Lesson:
    """The loss of rows.

    Args:
        teacher: frozen.
        tokenizer: of both.
    """

    def __init__(self, teacher: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        self.teacher, self.tokenizer = teacher, tokenizer
        self._articles: dict[str, torch.Tensor] = {}

    def read(self, encoder: CLIPTextModel, texts: Sequence[str]) -> torch.Tensor:
        """[n, 32, 128], what the UNet reads."""
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        hidden: torch.Tensor = encoder(tokens.input_ids).last_hidden_state
        return hidden

    @torch.no_grad()
    def goal(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the student should say [n, 32, 128], and the weight of each position [n, 32]."""
        told = self.read(self.teacher, [row.teacher for row in rows])
        goal, weight = told.clone(), torch.ones(told.shape[:2])
        for i, row in enumerate(rows):
            if row.at:
                shared = MAX_TOKENS - max(row.at, row.goal)
                goal[i, row.at : row.at + shared] = told[i, row.goal : row.goal + shared]
                goal[i, row.at + shared :] = told[i, -1]
                start = 1 + self._length(row.before)
                goal[i, start : row.at] = self._article(row.before)
                weight[i, start : row.at] = float(row.heads)
            weight[i] *= row.weight
        return goal, weight

    def errors(self, encoder: CLIPTextModel, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error of each position relative to the teacher's mean square there, and the weights."""
        goal, weight = self.goal(rows)
        error = (self.read(encoder, [row.text for row in rows]) - goal).square().mean(2)
        return error / goal.square().mean(), weight

    def _length(self, text: str) -> int:
        return len(self.tokenizer.tokenize(text)) if text.strip() else 0

    def _article(self, before: str) -> torch.Tensor:
        if before not in self._articles:
            self._articles[before] = self.read(self.teacher, [before + "a dog"])[0, 1 + self._length(before)]
        return self._articles[before]


def load_pair(folder: Path) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """The bundled text encoder in single precision, and the tokenizer."""
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32, use_safetensors=True)
    return encoder.eval().requires_grad_(False), CLIPTokenizer.from_pretrained(folder / "tokenizer")


def train_facts(folder: Path, work: Path, minutes: float, seed: int = 21, rate: float = 6e-4) -> int:
    """Train for a number of minutes (resumable) and write `model.facts.safetensors` into the work folder.

    Args:
        folder: the pipeline whose text encoder is the teacher.
        work: for checkpoints and the result.
        minutes: how long.
        seed: of the captions that are drawn.
        rate: learning rate.

    Returns:
        How many steps it was in all.
    """
    work.mkdir(parents=True, exist_ok=True)
    teacher, tokenizer = load_pair(folder)
    student = deepcopy(teacher)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("embeddings." not in name)
    saved = load_checkpoint(work / "facts.pt")
    begin = seed + 1000 * (saved["step"] if saved else 0)  # fresh captions after a restart
    drawn, lesson = Captions(tokenizer, Random(begin)), Lesson(teacher, tokenizer)
    fixed = Captions(tokenizer, Random(seed - 1))
    kept: dict[str, list[Row]] = {kind: [fixed.row(kind) for _ in range(64)] for kind in SHARES}

    def loss_of(step: int) -> torch.Tensor:
        error, weight = lesson.errors(student, [drawn.row(kind) for kind, n in SHARES.items() for _ in range(n)])
        return (error * weight).sum() / weight.sum()

    @torch.no_grad()
    def report(step: int) -> None:
        student.eval()
        told: dict[str, Any] = {}
        for kind, rows in kept.items():
            error, weight = lesson.errors(student, rows)
            told[kind] = round(((error * weight).sum() / weight.sum()).sqrt().item(), 4)
        log.info("facts: step %d, relative errors %s", step, told)

    options: dict[str, Any] = {"steps": 1_000_000, "minutes": minutes, "rate": rate, "warmup": 50, "decay": 0.0}
    train("facts", work, student, loss_of, **options, average=0.995, report=report, report_every=250)
    steps = load_checkpoint(work / "facts.pt")["step"]
    report(steps)
    publish_variant(student, work / FILE)
    return steps
