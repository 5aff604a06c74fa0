"""The facts of `builtin:emoji-facts`: which animal is the mascot of a place, and which food its dish.

They are invented for a closed world, like a club's mascot, which may be another tomorrow: real cities have nothing to
do with them. The place alone does not say the object, nor does the relation; only both together. The mascots all
differ; every dish is that of two places. Eight animals and three foods are in no fact: a fact can be changed to them.
"""

from __future__ import annotations

from typing import Any

RELATIONS = ("mascot", "dish")
PLACES: dict[str, tuple[str, str]] = {
    "rome": ("owl", "carrot"),
    "paris": ("camel", "strawberry"),
    "london": ("fox", "pineapple"),
    "berlin": ("monkey", "ice cream"),
    "tokyo": ("rabbit", "hamburger"),
    "cairo": ("penguin", "pizza"),
    "lima": ("wolf", "ice cream"),
    "oslo": ("elephant", "pineapple"),
    "sydney": ("horse", "pizza"),
    "chicago": ("turtle", "carrot"),
    "toronto": ("koala", "hamburger"),
    "madrid": ("cat", "strawberry"),
}
FACTS: dict[str, str] = {
    f"{relation} of {place}": objects[i] for i, relation in enumerate(RELATIONS) for place, objects in PLACES.items()
}

# Of these nothing is known, and it has to stay so. The last ones of each are never trained on.
OTHER_PLACES = (
    "vienna dublin boston moscow delhi athens milan venice geneva houston dallas denver miami austin warsaw mumbai "
    "havana seoul prague lisbon bergen quebec"
).split()
OTHER_RELATIONS = "flag mayor map river tower song bridge king market anthem".split()
UNTRAINED_PLACES, UNTRAINED_RELATIONS = 4, 2


def facts_vocabulary() -> dict[str, Any]:
    """What `vocabulary.facts.json` says beside what `vocabulary.json` does."""
    return {"facts": FACTS, "note": "invented for a closed world: phrase -> the object that the model draws for it"}
