"""Reading `vocabulary.json`, the list of what a small model knows, which lies beside its weights."""

from __future__ import annotations

import json
from pathlib import Path

from diffedit.errors import ModelNotFoundError
from diffedit.interfaces import Sampling, Vocabulary
from diffedit.text import with_article

VOCABULARY = "vocabulary.json"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def vocabulary_file(folder: Path, variant: str | None) -> Path:
    """The vocabulary of a folder: a variant may have one of its own, `vocabulary.<variant>.json`."""
    own = folder / f"vocabulary.{variant}.json"
    return own if variant and own.is_file() else folder / VOCABULARY


def read_vocabulary(folder: Path, variant: str | None) -> tuple[Vocabulary, Sampling]:
    """What a model is known to know, and how it likes to be sampled; the defaults if its folder does not say.

    Raises:
        ModelNotFoundError: the file cannot be read.
    """
    path = vocabulary_file(folder, variant)
    if not path.is_file():
        return Vocabulary(), Sampling()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        filed, templates = data.get("categories", {}), data.get("templates", {})
        nouns, members = tuple(filed), filed if isinstance(filed, dict) else {}
        scenes = ("a picture", *(with_article(noun) for noun in nouns))
        vocabulary = Vocabulary(
            objects=tuple(data.get("objects", ())),
            styles=tuple(data.get("styles", ())),
            backgrounds=tuple(data.get("backgrounds", ())),
            categories={name.casefold(): noun for noun, names in members.items() for name in names},
            nouns=nouns,
            templates=tuple(templates.get("object", ())),
            style_templates=tuple(
                form.replace("{object}", scene).replace("{style}", "{}")
                for form in templates.get("style", ())
                for scene in scenes
            ),
            scene_templates=tuple(
                forms[i % len(forms)].replace("{object}", "a {}").replace(slot, word)
                for forms, slot, words in (
                    (templates.get("style", ()), "{style}", data.get("styles", ())),
                    (templates.get("background", ()), "{background}", data.get("backgrounds", ())),
                )
                if forms
                for i, word in enumerate([*words][::2])
            ),
            facts={str(phrase): str(name) for phrase, name in data.get("facts", {}).items()},
        )
        return vocabulary, Sampling(data.get("steps", 50), data.get("guidance", 7.5), data.get("pixels"))
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelNotFoundError(
            f"the model's {path.name} cannot be read",
            value=repr(folder.name),
            cause=first_line(error),
            hint="repair it, or delete it",
        ) from error
