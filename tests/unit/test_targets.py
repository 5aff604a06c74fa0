"""What is filled in when the user says little: kinds, templates, what to preserve, when the end of text is paired."""

from __future__ import annotations

import pytest

from diffedit import Editor
from diffedit.interfaces import LoadedModel, Vocabulary
from diffedit.locators.text_mlp_range import TextMLPRangeLocator
from diffedit.preparing import CROWDED
from diffedit.request import make_request
from diffedit.site import Role
from diffedit.targets import Completer, default_preserve, default_templates, guess_kind, other_facts
from diffedit.updaters.closed_form import QuickFix
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


def test_a_category_that_would_bring_another_edited_member_back_is_not_the_target(sd1):
    many = tuple(f"beast {i}" for i in range(10))
    known = Vocabulary(objects=("dog", "cup", *many), categories={n: "animal" for n in ("dog", *many)})
    both = with_vocabulary(sd1, known).ablate(["dog", "beast 3"])
    assert {request.target for request in both.requests} <= {*many} - {"beast 3"}
    assert "with 1 more of its kind edited; nearest of 9 others" in both.manifest.target_reasons[0]
    both.revert()
    every = with_vocabulary(sd1, known).ablate(["dog", *many])
    assert {request.target for request in every.requests} == {"cup"}  # nothing else stays


def test_of_a_few_styles_the_nearest_other_one_takes_the_place(sd1):
    """A picture in no style is drawn in one of those that the model knows, the edited one among them."""
    edit = with_vocabulary(sd1).ablate("pixel")
    assert edit.requests[0].target == "sepia"
    assert "lists the style 'pixel', one of only 2 members; nearest of 1 others" in edit.manifest.target_reasons[0]
    edit.revert()
    unlisted = with_vocabulary(sd1).ablate("cubism style")
    assert unlisted.requests[0].target == "picture"
    unlisted.revert()
    both = with_vocabulary(sd1).ablate(["pixel", "sepia"], kind="style")
    assert {request.target for request in both.requests} == {"picture"}


def test_more_names_than_one_layer_has_room_for_are_noted(sd1):
    editor = Editor(sd1)
    room = editor.backend.sites(Role.TEXT_SELF_ATTN_OUT)[0].d_in // CROWDED
    names = [f"{a} {b}" for a in ("big", "small", "old", "new") for b in ("cup", "box", "tree", "ship")]
    assert room < len(names)
    few = editor.ablate(names[:room], target="dog")
    assert few.notes == () == editor.plan(names[:room], target="dog").notes
    few.revert()
    many = editor.ablate(names[: room + 1], target="dog")
    assert f"{room + 1} names are many for one layer" in many.notes[0] and "text-mlp-range" in many.notes[0]
    assert editor.plan(names[: room + 1], target="dog").notes == many.notes
    many.revert()
    spread = TextMLPRangeLocator(stop=1.0)
    assert editor.ablate(names[: room + 1], target="dog", locator=spread).notes == ()


def test_the_tail_weighs_more_where_later_layers_are_edited(sd1):
    one, several = (
        QuickFix()._weights(make_request(subject="dog", action="ablate"), spread) for spread in (False, True)
    )
    assert (one.eos, several.eos) == (0.3, 1.0)
    assert QuickFix(eos_weight=0.7)._weights(make_request(subject="dog", action="ablate"), True).eos == 0.7


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
