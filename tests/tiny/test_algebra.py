"""Proves the algebra of edits on tiny pipelines: composing edits made at different times is the joint solve, taking one
out is the solve without it, scaling scales, and conflicts are seen before anything is applied."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch

from diffedit import Editor, compose
from diffedit.edit import Edit
from diffedit.errors import (
    BaseMismatchError,
    ContradictionError,
    IntegrityError,
    NotComposableError,
    RequestError,
)
from diffedit.locators.fixed import FixedLocator
from diffedit.request import make_request
from diffedit.updaters.closed_form import QuickFix
from tests.tiny import build


def dense(edit: Edit) -> torch.Tensor:
    (change,) = edit.delta.factors.values()
    return change.dense()


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def solved(editor: Editor, requests, updater=None) -> torch.Tensor:
    """The joint solve on the model in float64, before anything is rounded for a file."""
    updater = updater or QuickFix()
    location = FixedLocator().locate(editor.backend, requests)
    (pairs,) = updater.solve(editor.backend, requests, location).pairs.values()
    keys, residuals, held = pairs.stack()
    d = keys.shape[1]
    gram = updater.lam * torch.eye(d).double() + keys.T @ keys + updater.preserve_weight * held.T @ held
    return residuals.T @ keys @ torch.linalg.inv(gram)


@pytest.fixture
def editor(sd1) -> Editor:
    return Editor(sd1)


@pytest.fixture
def made(editor) -> list[Edit]:
    """Three edits, made one after the other while the earlier ones are in the model."""
    return [
        editor.ablate("dog", target="cat", preserve=["owl", "fox"]),
        editor.ablate("Snoopy", target="bird", preserve=["owl"], aliases=["the Snoopy"]),
        editor.update("fox", "old car"),
    ]


def test_composing_is_the_joint_solve_in_any_order(editor, made):
    editor.revert()
    whole = compose(made)
    for order in itertools.permutations(made):
        again = compose(order)
        assert again.id == whole.id and again.files() == whole.files()
    nested = compose([made[2], compose([made[1], made[0]])])
    assert torch.equal(dense(nested), dense(whole)) and nested.requests == whole.requests
    requests = [request for edit in made for request in edit.requests]
    random.Random(0).shuffle(requests)
    # the two float64 solves, from bits that were captured in separate sessions
    (pairs,) = whole.delta.pairs.values()
    keys, residuals, held = pairs.stack()
    gram = 0.01 * torch.eye(keys.shape[1]).double() + keys.T @ keys + 0.1 * held.T @ held
    assert gap(residuals.T @ keys @ torch.linalg.inv(gram), solved(editor, requests)) <= 1e-10
    assert gap(dense(whole), dense(editor.run(requests))) <= 1e-6  # float32 factors
    assert gap(sum(dense(edit) for edit in made), dense(whole)) > 1e-3  # control: adding is something else


def test_what_is_edited_is_no_longer_preserved(made):
    whole = compose(made)
    assert {r.subject: r.preserve for r in whole.requests}["dog"] == ("owl",)
    (pairs,) = whole.delta.pairs.values()
    assert [entry.name for entry in pairs.held] == ["owl"]
    (alone,) = made[0].delta.pairs.values()
    assert sorted(entry.name for entry in alone.held) == ["fox", "owl"]


def test_the_same_preserved_name_counts_once(editor):
    a, b = (editor.ablate(name, target="cat", preserve=["owl", "car"]) for name in ("dog", "fox"))
    joint = editor.ablate(["dog", "fox"], target="cat", preserve=["owl", "car"])
    assert gap(dense(compose([a, b])), dense(joint)) <= 1e-6
    (pairs,) = compose([a, b]).delta.pairs.values()
    assert len(pairs.held) == 2


@pytest.mark.parametrize("tol", [0.0, 0.01, 0.3])
def test_without_is_the_solve_without_it(editor, tol):
    updater = QuickFix(pair_tol=tol)
    joint = editor.ablate(["dog", "fox", "Snoopy"], target="cat", preserve=["owl"], updater=updater)
    rest = joint.without("fox")
    assert [request.subject for request in rest.requests] == ["dog", "Snoopy"]
    kept = [request for request in joint.requests if request.subject != "fox"]
    assert gap(dense(rest), dense(editor.run(kept, updater=updater))) <= 1e-6
    editor.revert()
    (pairs,) = rest.delta.pairs.values()
    keys, residuals, held = pairs.stack()
    gram = 0.01 * torch.eye(keys.shape[1]).double() + keys.T @ keys + 0.1 * held.T @ held
    assert gap(residuals.T @ keys @ torch.linalg.inv(gram), solved(editor, kept, updater)) <= 1e-10
    assert rest.without("DOG").requests == (joint.requests[2],)
    assert compose([joint.without("dog", "snoopy"), rest]).requests  # taken apart and put together
    again = compose([joint.without("dog", "snoopy"), rest])
    assert gap(dense(again), dense(joint)) <= 1e-6


def test_scaling(editor, made):
    half = 0.5 * made[0]
    assert torch.equal(dense(half), dense(made[0]) * 0.5) and half.id != made[0].id
    assert half.requests[0].strength == 0.5 and (half * 2).requests[0].strength == 1
    assert half.manifest.parents == (made[0].id,)
    both = compose([half, made[1]])
    joint = editor.run([*half.requests, *made[1].requests])
    assert gap(dense(both), dense(joint)) <= 1e-6
    for bad in (0, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="strength"):
            made[0] * bad
    with pytest.raises(TypeError):
        made[0] * "2"


def test_opposites_cancel_in_the_model(editor, sd1):
    before = copy.deepcopy(sd1.text_encoder.state_dict())
    edit = editor.ablate("dog", target="cat")
    editor.load(edit * -1)
    for name, value in sd1.text_encoder.state_dict().items():
        assert torch.allclose(value, before[name], atol=1e-6)


def test_a_composed_edit_travels(tmp_path, editor, sd1, made):
    editor.revert()
    folder = compose(made[:2]).save(tmp_path / "both")
    loaded = Edit.load(folder)
    assert loaded.files() == compose(made[:2]).files()
    assert loaded.manifest.sites[0].result_sha256 is None and "not applied yet" in loaded.summary()
    editor.load(loaded)
    weight = sd1.text_encoder.state_dict()["encoder.layers.0.self_attn.out_proj.weight"]
    base = editor.ledger.base(loaded.delta.sites[0])
    assert gap(weight.double() - base.double(), dense(loaded)) < 1e-4
    assert compose([loaded, made[2]]).id == compose(made).id or compose([loaded, made[2]]).requests


def test_pairs_that_are_missing_or_damaged(tmp_path, made):
    folder = made[0].save(tmp_path / "a")
    other = made[1].save(tmp_path / "b")
    data = (folder / "pairs.safetensors").read_bytes()
    for spoiled in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), (other / "pairs.safetensors").read_bytes()):
        (folder / "pairs.safetensors").write_bytes(spoiled)
        with pytest.raises((IntegrityError, Exception)) as caught:
            Edit.load(folder)
        assert caught.value.code.startswith("DE-5")
    (folder / "pairs.safetensors").unlink()
    alone = Edit.load(folder)
    assert alone.id == made[0].id and torch.equal(dense(alone), dense(made[0]))
    with pytest.raises(NotComposableError, match=r"pairs.safetensors"):
        compose([alone, made[1]])
    assert torch.equal(dense(alone * 0.5), dense(made[0]) * 0.5)  # scaling needs none


def test_conflicts_are_seen_before_anything_is_applied(editor):
    dog, same = (editor.ablate(n, target=t, updater=build.plain()) for n, t in (("dog", "cat"), ("Dog", "old car")))
    found = dog.conflicts(same)
    assert [c.kind for c in found][:2] == ["contradiction", "same subject"] and found[0].cosine > 0.999
    with pytest.raises(RequestError, match="two edits"):
        compose([dog, same])
    keeps = editor.ablate("Snoopy", target="cat", preserve=["dog"])
    assert "preserved" in {c.kind for c in dog.conflicts(keeps)} & {c.kind for c in keeps.conflicts(dog)}
    fox = editor.ablate("fox", target="owl")
    near = dog.conflicts(fox, threshold=0)
    assert [c.kind for c in near] == ["interference"] and near[0].interference > 0
    assert not dog.conflicts(fox, threshold=1e9)


def test_interference_is_what_the_other_edit_does_to_the_keys(editor):
    a, b = editor.ablate("dog", target="cat"), editor.ablate("fox", target="owl")
    (conflict,) = a.conflicts(b, threshold=0)
    (pa,), (pb,) = a.delta.pairs.values(), b.delta.pairs.values()
    moved = [
        float((entry.keys.double() @ dense(edit).T).norm() / entry.residuals.double().norm())
        for edit, entry in ((b, pa.wanted[0]), (a, pb.wanted[0]))
    ]
    assert conflict.interference == pytest.approx(max(moved), rel=1e-9)


def test_a_contradiction_in_one_solve_is_refused(editor):
    requests = [make_request(subject=s, target=t) for s, t in (("dog", "cat"), ("DOG ", "old car"))]
    with pytest.raises(RequestError, match="twice"):
        editor.run(requests)
    a = make_request(subject="dog", target="cat", templates=["a {}", "my old {}"])
    b = make_request(subject="old dog", target="bird", templates=["my {}"])
    with pytest.raises(ContradictionError, match="'dog' and 'old dog'"):
        editor.run([a, b], updater=build.plain())


def test_what_has_no_common_solve(editor, tokenizer_folder, made):
    other = Editor(build.pipeline(tokenizer_folder, family="sd1", layout="flat", seed=5))
    with pytest.raises(BaseMismatchError):
        compose([made[0], other.ablate("Snoopy", target="cat")])
    for change in (dict(updater=QuickFix(lam=1.0)), dict(locator=FixedLocator(layer=1))):
        with pytest.raises(NotComposableError, match=r"settings|sites"):
            compose([made[0], editor.ablate("Garfield", target="cat", **change)])
    for bad in ([], made[0], [made[0], "x"]):
        with pytest.raises(RequestError):
            compose(bad)
    for names in ((), ("wolf",), ("dog",)):
        with pytest.raises(RequestError):
            made[0].without(*names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(sd1, dtype):
    editor = Editor(sd1.to(dtype))
    a, b = editor.ablate("dog", target="cat"), editor.ablate("Snoopy", target="bird")
    joint = editor.run([*a.requests, *b.requests])
    assert gap(dense(compose([a, b])), dense(joint)) <= 1e-6
