"""`expand`: the other names are solved for, recorded, told with their reasons, and stay with the edit from then on."""

from __future__ import annotations

import logging

import pytest

from diffedit import Edit, Editor, compose
from diffedit.errors import RequestError


@pytest.fixture
def editor(sd1) -> Editor:
    return Editor(sd1)


def moved(editor: Editor, edit: Edit, name: str) -> float:
    """|D k| / |W k| at the last token of "a photo of a NAME": how far the edit moves the layer's output there."""
    site, change = next(iter(edit.delta))
    prompt = f"a photo of a {name}"
    with editor.ledger.unedited():
        seen = editor.backend.capture([prompt], [site])
        key = seen.inputs[site][0, editor.backend.span(prompt, name).last].double()
        weight = editor.backend.weight(site).detach().double()
        return float((change.dense() @ key).norm() / (weight @ key).norm())


def test_the_other_names_are_edited_and_told(editor, caplog):
    plain = editor.ablate("dog", target="cat", preserve=["pig"])
    assert plain.requests[0].aliases == () and plain.notes == ()
    editor.revert()
    with caplog.at_level(logging.INFO, "diffedit"):
        edit = editor.ablate("dog", target="cat", preserve=["pig", "dgo"], expand="all")
    (request,) = edit.requests
    assert request.aliases[0] == "dogs" and {"doog", "dogg"} <= set(request.aliases)
    for name in request.aliases:
        assert moved(editor, edit, name) > 2 * moved(editor, plain, name), name
    for text in (caplog.text, edit.summary()):
        assert "'dogs' (plural), " in text and "'doog' (misspelt: a letter doubled)" in text
    assert edit.notes == ("'dgo' is not edited with 'dog': misspelt: two letters swapped, but to be preserved",)
    assert edit.notes[0] in caplog.text


def test_they_stay_with_the_edit(editor, tmp_path):
    edit = editor.ablate("dog", target="cat", expand="forms")
    loaded = Edit.load(edit.save(tmp_path / "edit"))
    assert loaded.requests == edit.requests and loaded.files() == edit.files()
    assert "'dogs' (plural)" in loaded.summary()
    assert b"| dog, dogs |" in loaded.files()["README.md"]
    editor.revert()
    pig = editor.ablate("pig", target="cat", expand="forms")
    both = compose([edit, pig])
    assert {name for request in both.requests for name in request.names} == {"dog", "dogs", "pig", "pigs"}
    assert both.without("pig").requests == edit.requests and (edit * 0.5).requests[0].aliases == ("dogs",)


def test_naming_them_by_hand_makes_the_same_edit(editor):
    found = editor.ablate("dog", target="cat", expand="forms")
    editor.revert()
    given = editor.ablate("dog", target="cat", aliases=["dogs"])
    assert given.id == found.id


def test_several_subjects_have_their_own(editor):
    edit = editor.ablate(["dog", "sea pig"], target="cat", expand="forms")
    assert [request.aliases for request in edit.requests] == [("dogs",), ("sea pigs", "sea-pig", "seapig")]
    with pytest.raises(RequestError, match="one subject"):
        editor.ablate(["dog", "pig"], aliases=["hound"], expand="forms")


def test_an_update_and_a_plan_take_it_too(editor):
    plan = editor.plan("dog", target="cat", preserve=["dogs"], expand="all")
    assert "doog" in plan.requests[0].aliases and any("'dogs' is not edited" in note for note in plan.notes)
    wide, plain = (editor.plan("dog", target="cat", expand=how) for how in ("forms", "none"))
    assert wide.requests[0].aliases == ("dogs",) and wide.prompts > plain.prompts
    edit = editor.update("dog", "boat", expand="forms")
    assert edit.requests[0].aliases == ("dogs",) and edit.requests[0].action == "update"


@pytest.mark.parametrize("how", ["form", "", None, True])
def test_another_setting_is_refused_before_anything_happens(editor, how):
    with pytest.raises(RequestError, match="no such expansion"):
        editor.ablate("dog", target="cat", expand=how)
    assert editor.edits == ()
