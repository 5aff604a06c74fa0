"""What is filled in when the user says little: kinds, templates, what to preserve, when the end of text is paired."""

from __future__ import annotations

import pytest

from diffedit import Editor
from diffedit.interfaces import LoadedModel, Vocabulary
from diffedit.targets import Completer, default_preserve, default_templates, guess_kind, other_facts
from tests.tiny import build

KNOWN = Vocabulary(
    objects=("dog", "fox", "Oak tree"),
    styles=("pixel", "sepia"),
    categories={"dog": "animal", "fox": "animal"},
    nouns=("animal", "plant"),
    templates=("{}", "a sketch of {}"),
    style_templates=("an animal, {} style",),
)


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        ("in the style of Monet", ("style", "Monet")),
        ("Monet style", ("style", "Monet")),
        ("Pixel", ("style", "Pixel")),
        ("dog", ("object", "dog")),
        (" style", ("object", " style")),
    ],
)
def test_a_style_is_known_by_its_words_or_by_the_vocabulary(subject, expected):
    assert guess_kind(subject, KNOWN) == expected


def test_everything_else_of_the_same_kind_is_preserved():
    assert default_preserve("object", ["a Dog"], KNOWN) == ("fox", "Oak tree")
    assert default_preserve("style", ["pixel"], KNOWN) == ("sepia",)
    assert default_preserve("object", ["dog"], Vocabulary()) == ()


def test_the_vocabulary_adds_its_own_templates():
    assert default_templates("object", KNOWN)[-1] == "a sketch of a {}"
    assert default_templates("style", KNOWN)[-1] == "an animal, {} style"
    assert "a sketch of a {}" not in default_templates("object", Vocabulary())


def with_vocabulary(pipeline, vocabulary=KNOWN):
    editor = Editor(pipeline)
    loaded = editor.backend.model
    editor.backend.model = LoadedModel(loaded.pipeline, loaded.source, vocabulary=vocabulary)
    editor._complete = Completer(editor.backend)
    return editor


def test_a_filed_object_becomes_its_category(sd1):
    many = tuple(f"beast {i}" for i in range(10))
    edit = with_vocabulary(sd1, Vocabulary(objects=("dog", *many), categories={n: "animal" for n in ("dog", *many)}))
    edit = edit.ablate("dog")
    assert edit.requests[0].target == "animal"
    assert "files 'dog' under 'animal'" in edit.manifest.target_reasons[0]
    assert edit.requests[0].preserve == many


def test_in_a_small_category_it_becomes_the_nearest_other_member(sd1):
    """The category's own word would bring the subject back every so often."""
    edit = with_vocabulary(sd1).ablate("dog")
    assert edit.requests[0].target == "fox"
    assert "only 2 members; nearest of 1 others" in edit.manifest.target_reasons[0]
    alone = with_vocabulary(sd1, Vocabulary(objects=("dog",), categories={"dog": "animal"})).ablate("dog")
    assert alone.requests[0].target == "animal"


def test_the_tail_is_paired_only_for_objects_beside_something_held(sd1):
    editor = with_vocabulary(sd1)

    def pairs(**arguments):
        edit = editor.ablate(**arguments)
        editor.revert()
        return edit.delta.diagnostics[edit.delta.sites[0]].pairs / len(edit.requests[0].templates)

    assert pairs(subject="dog") == 2  # and the end of text
    assert pairs(subject="dog", target="cat", preserve=[]) == 2  # everyday captions are held
    assert pairs(subject="dog", target="cat", updater=build.plain()) == 2
    assert pairs(subject="dog", target="cat", preserve=[], updater=build.plain()) == 1
    assert pairs(subject="pixel", target="cat") == 1


FACTS = {"mascot of rome": "owl", "dish of rome": "pizza", "mascot of paris": "fox", "dish of paris": "carrot"}


def test_facts_are_preserved_with_the_objects_but_not_with_styles():
    known = Vocabulary(objects=("owl", "fox"), styles=("pixel", "sepia"), facts=FACTS)
    assert default_preserve("object", ["mascot of rome"], known) == ("owl", "fox", *list(FACTS)[1:])
    assert default_preserve("object", ["the owl"], known) == ("fox", *FACTS)
    assert default_preserve("style", ["pixel"], known) == ("sepia",)


def test_the_facts_nearest_to_a_fact_share_its_words_and_first_its_last_one():
    known = Vocabulary(facts=FACTS)
    assert other_facts(["Mascot of Rome"], known) == ("dish of rome", "mascot of paris", "dish of paris")
    assert other_facts(["owl"], known) == tuple(FACTS)
