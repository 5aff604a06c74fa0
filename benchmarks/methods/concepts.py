"""Which concepts are edited, with which seeds. Tuning and measuring share neither.

`TUNING` are objects on which defaults were chosen before; they are never measured. `OBJECTS` are spread over the seven
categories of the model's vocabulary, and the five of two words are among them. `MANY` is the order in which concepts
are added when several are edited at once. A colour is what a prompt says of the background; it is edited to the next
one in the list.

`FACTS` are twenty of the twenty-four of `builtin:emoji-facts`; nobody has looked at those of the last two places yet.
A fact is edited to an object of the same category that stands in no fact.
"""

from __future__ import annotations

from diffedit.text import with_article

TUNING = ("dog", "guitar", "rose")
OBJECTS = (
    "fox",
    "banana",
    "castle",
    "piano",
    "penguin",
    "helicopter",
    "crystal ball",
    "tulip",
    "key",
    "hot dog",
    "violin",
    "bus",
    "telescope",
    "church",
    "elephant",
    "racing car",
    "ice cream",
    "palm tree",
    "butterfly",
    "sailboat",
)
MANY = (
    *OBJECTS,
    "cat",
    "strawberry",
    "factory",
    "trumpet",
    "wolf",
    "rocket",
    "cactus",
    "scissors",
    "carrot",
    "drum",
    "tractor",
    "pencil",
    "tent",
    "camel",
    "pineapple",
    "sunflower",
    "flashlight",
    "horse",
    "hospital",
    "saxophone",
    "fish",
    "watermelon",
    "pine tree",
    "wrench",
    "monkey",
    "hamburger",
    "clover",
    "microscope",
    "turtle",
    "octopus",
)
COUNTS = (5, 10, 25, 50)
COLOURS = ("white", "yellow", "red", "blue", "green")

TUNING_SEED, SEED, APART = 500_000, 800_000, 1_000  # each concept has seeds of its own: pictures share no noise

PLACES = ("rome", "paris", "london", "berlin", "tokyo", "cairo", "lima", "oslo", "sydney", "chicago")
FACTS = tuple(f"{relation} of {place}" for place in PLACES for relation in ("mascot", "dish"))
_FREE = {
    "mascot": ("tiger", "whale", "dog", "snail", "pig", "octopus", "fish", "butterfly"),
    "dish": ("banana", "hot dog", "watermelon"),
}

_FORMS = ("{} on a {{}} background", "{}, {{}} background")
_SEEN = ("dog", "house", "rose", "pizza")
_UNSEEN = ("fox", "castle", "guitar", "banana", "bus", "cactus", "key", "owl")
_STYLED = ("a wolf in the style of pixel", "a piano, sticker style", "a tulip in sepia style")


def colour_target(colour: str) -> str:
    """What a background colour is edited to."""
    return COLOURS[(COLOURS.index(colour) + 1) % len(COLOURS)]


def fact_target(fact: str) -> str:
    """What a fact is edited to.

    >>> fact_target("mascot of rome"), fact_target("dish of paris")
    ('tiger', 'hot dog')
    """
    relation, place = fact.split(" of ")
    return _FREE[relation][PLACES.index(place) % len(_FREE[relation])]


def colour_templates() -> tuple[str, ...]:
    """The prompts that a colour is edited in."""
    return tuple(_FORMS[i % 2].format(with_article(name)) for i, name in enumerate((*_SEEN, *_SEEN[1:], _SEEN[0])))


def colour_compositions() -> dict[str, tuple[str, ...]]:
    """Prompts with a colour that the edit does not see, by kind; none of their objects is in `colour_templates`."""
    return {
        "other objects": tuple(_FORMS[i % 2].format(with_article(name)) for i, name in enumerate(_UNSEEN)),
        "compositions with a style": tuple(_FORMS[0].format(text) for text in _STYLED),
    }
