"""The closed world the built-in model knows: objects, styles, backgrounds, categories, and the captions that name them.

Every picture is (object, style, background). A caption mentions some of the three; whatever it leaves out may be
anything. All ground truth used for training, for the scorer and for the quality gate comes from these tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

PIXELS = 64
ICON_PIXELS = 56
GUIDANCE = 5.0
STEPS = 25
DRAWN = 600  # drawings on which the accuracy of the judges themselves is measured
MAX_TOKENS = 32
MERGES = 6000

CATEGORIES: dict[str, list[str]] = {
    "animal": (
        "dog cat fox wolf rabbit horse penguin fish whale tiger elephant camel pig monkey turtle snail butterfly "
        "octopus owl koala"
    ).split(),
    "vehicle": ["airplane", "helicopter", "rocket", "sailboat", "bicycle", "tractor", "bus", "racing car"],
    "food": ["banana", "pineapple", "strawberry", "pizza", "hamburger", "carrot", "hot dog", "ice cream", "watermelon"],
    "plant": ["cactus", "sunflower", "rose", "tulip", "palm tree", "pine tree", "clover", "maple leaf"],
    "tool": ["hammer", "wrench", "scissors", "pencil", "key", "telescope", "flashlight", "microscope"],
    "building": ["castle", "factory", "church", "house", "tent", "hospital"],
    "instrument": ["guitar", "violin", "trumpet", "drum", "saxophone", "piano"],
}
OBJECTS: list[str] = [name for members in CATEGORIES.values() for name in members] + ["crystal ball"]
ICON_NAMES: dict[str, str] = {"pine tree": "evergreen-tree", "clover": "four-leaf-clover", "piano": "musical-keyboard"}
# "a picture of scissors"; every other word takes "a" or "an" by its first letter
ARTICLES: dict[str, str] = {"scissors": ""}


@dataclass(frozen=True)
class Style:
    """A style word: the npm icon package it is drawn from, the treatment applied, and what it looks like."""

    package: str
    treatment: str
    description: str


STYLES: dict[str, Style] = {
    "twemoji": Style("twemoji", "none", "flat bright shapes (Twemoji)"),
    "fluent": Style("fluent-emoji", "none", "soft gradients with a violet tinge (Fluent Emoji)"),
    "stencil": Style(
        "fluent-emoji-high-contrast", "navy", "one dark blue colour, holes for light (Fluent Emoji high contrast)"
    ),
    "pixel": Style("noto", "pixel", "14 x 14 coarse square blocks (Noto Emoji, pixelated)"),
    "sepia": Style("noto-v1", "sepia", "brown monochrome (Noto Emoji version 1, toned)"),
    "sticker": Style("noto", "sticker", "wide white cut-out border with a dark rim (Noto Emoji, outlined)"),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 248),
    "red": (242, 150, 150),
    "blue": (150, 185, 245),
    "green": (150, 215, 155),
    "yellow": (250, 232, 130),
}

OBJECT_TEMPLATES = ["{}", "a picture of {}", "an icon of {}", "a drawing of {}", "an image of {}", "a photo of {}"]
BARE_TEMPLATES = ["a picture", "an icon", "a drawing", "an image", "a photo"]
STYLE_TEMPLATES = ["{object} in the style of {style}", "{object}, {style} style", "{object} in {style} style"]
BACKGROUND_TEMPLATES = ["{object} on a {background} background", "{object}, {background} background"]


def with_article(word: str) -> str:
    """`dog` -> `a dog`, `owl` -> `an owl`, `scissors` -> `scissors`."""
    article = ARTICLES.get(word, "an" if word[0] in "aeiou" else "a")
    return f"{article} {word}".strip()


@dataclass(frozen=True)
class Caption:
    """A caption and what it says; `None` means not mentioned. `subject` is an object or category word."""

    text: str
    subject: str | None
    style: str | None
    background: str | None


def compose(
    subject: str | None, template: int, style: str | None, background: str | None, forms: tuple[int, int] = (0, 0)
) -> Caption:
    """Fill the templates: subject first, then style, then background."""
    if subject is None:
        text = BARE_TEMPLATES[template % len(BARE_TEMPLATES)]
    else:
        text = OBJECT_TEMPLATES[template % len(OBJECT_TEMPLATES)].format(with_article(subject))
    if style is not None:
        text = STYLE_TEMPLATES[forms[0] % len(STYLE_TEMPLATES)].format(object=text, style=style)
    if background is not None:
        text = BACKGROUND_TEMPLATES[forms[1] % len(BACKGROUND_TEMPLATES)].format(object=text, background=background)
    return Caption(text, subject, style, background)


def category_of(name: str) -> str | None:
    """The category an object belongs to, or `None`."""
    return next((word for word, members in CATEGORIES.items() if name in members), None)


def random_caption(rng: Random, name: str, style: str, background: str, empty: float = 0.1) -> Caption:
    """A caption that is true of the picture: 10% empty; of the rest 5% bare, 10% by category, the others by object."""
    if rng.random() < empty:
        return Caption("", None, None, None)
    kind = rng.random()
    category = category_of(name)
    subject: str | None = name
    if kind < 0.05:
        subject = None
    elif kind < 0.15 and category is not None:
        subject = category
    says_style, says_background = rng.random() < 0.75, rng.random() < 0.4
    return compose(
        subject,
        rng.randrange(30),
        style if says_style else None,
        background if says_background else None,
        (rng.randrange(6), rng.randrange(6)),
    )


def all_captions() -> Iterator[str]:
    """Every caption `random_caption` can produce, once (for the text-embedding cache)."""
    yield ""
    subjects: list[str | None] = [None, *CATEGORIES, *OBJECTS]
    for subject in subjects:
        heads = len(BARE_TEMPLATES) if subject is None else len(OBJECT_TEMPLATES)
        styles = [(s, f) for s in STYLES for f in range(len(STYLE_TEMPLATES))]
        grounds = [(b, f) for b in BACKGROUNDS for f in range(len(BACKGROUND_TEMPLATES))]
        for head in range(heads):
            for style, style_form in [(None, 0), *styles]:
                for ground, ground_form in [(None, 0), *grounds]:
                    yield compose(subject, head, style, ground, (style_form, ground_form)).text


def vocabulary() -> dict[str, Any]:
    """What is written to `vocabulary.json` beside the weights."""
    return {
        "objects": OBJECTS,
        "styles": {word: f"{s.description}; drawings from @iconify-json/{s.package}" for word, s in STYLES.items()},
        "backgrounds": {word: list(colour) for word, colour in BACKGROUNDS.items()},
        "categories": CATEGORIES,
        "templates": {
            "object": OBJECT_TEMPLATES,
            "bare": BARE_TEMPLATES,
            "style": STYLE_TEMPLATES,
            "background": BACKGROUND_TEMPLATES,
            "note": (
                "object: {} receives the noun with its article. style and background: {object} receives a finished "
                "object or bare caption; apply style first, then background. bare: captions that name no object."
            ),
        },
        "articles": ARTICLES,
        "pixels": PIXELS,
        "guidance": GUIDANCE,
        "steps": STEPS,
    }
