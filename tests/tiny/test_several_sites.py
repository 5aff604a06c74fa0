"""Proves that several sites of one encoder are edited in turn: each reads the model under the edits before it and takes
its part of what is missing to the unedited target, as dense formulas say; strength scales all of them alike."""

from __future__ import annotations

import pytest
import torch

from diffedit import Editor, compose
from diffedit.edit import Edit
from diffedit.locators.text_layers import TextLayersLocator
from diffedit.site import EditSite, Role
from diffedit.updaters.closed_form import QuickFix, QuickFixPublished
from diffedit.updaters.layers import in_turn
from tests.tiny import build

TEMPLATES = ("a photo of a {}", "the {} in the sun")
EXACT = {"pair_tol": 0.0, "lam": 0.01, "subject_weight": 1.0, "eos_weight": 0.0}


def site(layer: int, role: Role, component: str = "text_encoder") -> EditSite:
    return EditSite(component, f"{layer}.{role}", layer, role, 2, 2)


def test_sites_take_turns_in_the_order_in_which_they_run():
    a, b = Role.TEXT_SELF_ATTN_OUT, Role.TEXT_MLP_OUT
    first, second, third = site(2, a), site(2, b), site(10, a)
    assert in_turn([third, second, first]) == [{first: 1 / 3}, {second: 1 / 2}, {third: 1.0}]
    other = site(0, a, "text_encoder_2")
    assert in_turn([other, first]) == [{first: 1.0, other: 1.0}]
    assert in_turn([first, other, second]) == [{first: 1 / 2, other: 1.0}, {second: 1.0}]
    assert in_turn([]) == []


def solved(editor: Editor, locator: TextLayersLocator) -> Edit:
    edit = editor.ablate(
        "dog", target="cat", templates=TEMPLATES, locator=locator, updater=build.plain(**EXACT), preserve=[]
    )
    editor.revert()
    return edit


def test_each_turn_is_the_dense_solve_of_its_part_of_the_way_to_the_unedited_target(sd1):
    sd1.text_encoder.double()
    editor = Editor(sd1)
    backend = editor.backend
    edit = solved(editor, TextLayersLocator(last=1))
    turns = in_turn(edit.delta.sites)
    assert [round(1 / share) for turn in turns for share in turn.values()] == [4, 3, 2, 1]
    kept = {s: backend.weight(s).detach().clone() for s in edit.delta.sites}
    prompts = [[t.format(name) for t in TEMPLATES] for name in ("dog", "cat")]
    at = [[backend.span(p, n).last for p in ps] for ps, n in zip(prompts, ("dog", "cat"), strict=True)]
    rows = torch.arange(len(TEMPLATES))
    goals = backend.capture(prompts[1], edit.delta.sites)
    for turn in turns:
        ((where, share),) = turn.items()
        source = backend.capture(prompts[0], [where])
        keys = source.inputs[where][rows, at[0]]
        missing = (goals.streams[where] + goals.outputs[where])[rows, at[1]]
        missing = missing - source.streams[where][rows, at[0]] - keys @ kept[where].T - backend.bias(where)
        gram = keys.T @ keys + EXACT["lam"] * torch.eye(where.d_in, dtype=torch.float64)
        want = share * missing.T @ keys @ gram.inverse()
        found = edit.delta.factors[where].dense().double()
        apart = (found - want).detach().norm() / want.detach().norm()
        assert float(apart) < 1e-5, where.name  # factors are kept in float32
        with torch.no_grad():
            backend.weight(where).add_(found)
    for where, weight in kept.items():
        with torch.no_grad():
            backend.weight(where).copy_(weight)


@pytest.mark.parametrize("updater", [QuickFix(), build.plain()])
@pytest.mark.parametrize("strength", [-1.0, 0.5, 3.0])
def test_strength_is_the_same_factor_for_several_sites_as_for_a_scaled_edit(sd1, strength, updater):
    editor = Editor(sd1)
    said = {"target": "cat", "locator": TextLayersLocator(last=0), "updater": updater}
    whole = editor.ablate("dog", **said)
    editor.revert()
    request = whole.requests[0].model_copy(update={"strength": strength})
    asked = editor.run([request], updater=updater, locator=said["locator"])
    for where, change in (whole * strength).delta.factors.items():
        found = asked.delta.factors[where].dense()
        assert float((found - change.dense()).norm() / change.dense().norm()) < 1e-5


def test_with_values_of_their_own_sites_write_all_of_them(sd1):
    editor = Editor(sd1)
    alone = {}
    for locator in (TextLayersLocator(mlp=False, last=0), TextLayersLocator(attention=False, last=0)):
        edit = editor.ablate("dog", target="cat", locator=locator, updater=QuickFixPublished())
        alone |= dict(edit.delta.factors)
        editor.revert()
    both = editor.ablate("dog", target="cat", locator=TextLayersLocator(last=0), updater=QuickFixPublished())
    assert both.delta.factors.keys() == alone.keys()
    for where, change in both.delta.factors.items():
        assert torch.equal(change.dense(), alone[where].dense())


def test_the_first_of_two_takes_half_and_nothing_is_left_in_the_model(sd1):
    editor = Editor(sd1)
    before = {name: value.clone() for name, value in sd1.text_encoder.state_dict().items()}
    one = solved(editor, TextLayersLocator(mlp=False, last=0))
    both = solved(editor, TextLayersLocator(last=0))
    (where,) = one.delta.sites
    half, whole = both.delta.factors[where].dense(), one.delta.factors[where].dense()
    assert float((2 * half - whole).norm() / whole.norm()) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in sd1.text_encoder.state_dict().items())
    assert not any(module._forward_hooks for module in sd1.text_encoder.modules())


def test_edits_of_several_sites_compose_travel_and_come_off(sd1, tmp_path):
    editor = Editor(sd1)
    locator = TextLayersLocator(last=0)
    dog = editor.ablate("dog", target="cat", locator=locator)
    editor.revert()
    car = editor.ablate("car", target="tree", locator=locator)
    editor.revert()
    both = compose([dog, car])
    assert both.delta.sites == dog.delta.sites
    weights = {s: editor.backend.weight(s).clone() for s in both.delta.sites}
    editor.load(Edit.load(both.save(tmp_path / "both")))
    assert all(not torch.equal(editor.backend.weight(s), weights[s]) for s in weights)
    editor.revert()
    assert all(torch.equal(editor.backend.weight(s), weights[s]) for s in weights)
