"""`uce`, `time` and `locoedit` through the editor on tiny pipelines: the right layers without being told, what these
layers read before and after, composing, and every way of asking for something that cannot be."""

from __future__ import annotations

import pytest
import torch

from diffedit import Editor, compose
from diffedit.errors import (
    ContradictionError,
    NonFiniteError,
    NoOpError,
    NotComposableError,
    RequestError,
    UnsupportedModelError,
)
from diffedit.locators.cross_attention import CrossAttentionLocator
from diffedit.locators.fixed import FixedLocator
from diffedit.request import make_request
from diffedit.site import Role, TokenRule
from diffedit.testing import model_state
from diffedit.updaters.cross_attention import TIME, UCE, LocoEdit

KEY, VALUE = Role.UNET_CROSS_ATTN_K, Role.UNET_CROSS_ATTN_V


def reading(pipe, prompt: str, position: int | None = None) -> torch.Tensor:
    """What all keys and values make of one token of a prompt, by default the last word's, one after the other."""
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    at = len(pipe.tokenizer(prompt).input_ids) - 2 if position is None else position
    with torch.no_grad():
        state = pipe.text_encoder(ids)[0][0, at]
        layers = [m for n, m in pipe.unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
        return torch.cat([layer(state) for layer in layers])


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_uce_finds_its_layers_and_the_subject_is_read_as_the_target(pipeline):
    editor, before = Editor(pipeline), model_state(pipeline)
    dog, cat, fox = (reading(pipeline, word) for word in ("dog", "cat", "fox"))
    edit = editor.ablate("dog", target="cat", preserve=["fox"], updater=UCE(lam=1e-6))
    after = model_state(pipeline)
    sites = editor.backend.sites(KEY, VALUE)
    assert {key for key in before if before[key] != after[key]} == {f"unet.{site.path}.weight" for site in sites}
    assert edit.manifest.locator.name == "cross-attention" and set(edit.delta.sites) == set(sites)
    assert gap(reading(pipeline, "dog"), cat) < 1e-3 < 0.1 < gap(dog, cat)  # with the control
    assert gap(reading(pipeline, "fox"), fox) < 1e-3
    assert gap(reading(pipeline, "a photo of a dog", 1), reading(pipeline, "a photo of a dog", 1)) == 0.0
    edit.revert()
    assert model_state(pipeline) == before


def test_time_reads_every_position_as_its_partner(sd1):
    """77 wishes in 32 directions, so a compromise: all positions taken together."""
    positions = range(1, 77)
    goal = torch.stack([reading(sd1, "cat", position) for position in positions])
    before = torch.stack([reading(sd1, "dog", position) for position in positions])
    Editor(sd1).ablate("dog", target="cat", updater=TIME(prompts="bare", lam=1e-6, pair_tol=0))
    after = torch.stack([reading(sd1, "dog", position) for position in positions])
    assert gap(after, goal) < 0.6 * gap(before, goal)
    assert gap(after[1:], goal[1:]) < 0.6 * gap(before[1:], goal[1:])  # and not only the subject's


def test_locoedit_edits_a_window(sd1):
    edit = Editor(sd1).ablate("dog", target="cat", updater="locoedit")
    assert edit.manifest.locator.name == "locogen"
    layers = sorted({site.layer for site in edit.delta.sites})
    assert layers == list(range(layers[0], layers[-1] + 1)) and len(edit.delta.sites) == 2 * len(layers)
    assert edit.manifest.updater.settings["lam"] == 0.01


def test_a_locator_that_is_named_is_used(sd1):
    editor = Editor(sd1)
    edit = editor.update("dog", "cat", updater="uce", locator=CrossAttentionLocator(keys=False, first=1, last=2))
    assert {(site.layer, site.role) for site in edit.delta.sites} == {(1, VALUE), (2, VALUE)}
    with pytest.raises(UnsupportedModelError, match="uce cannot edit these sites"):
        editor.ablate("fox", target="cat", updater="uce", locator="fixed")
    with pytest.raises(UnsupportedModelError, match="quickfix cannot edit these sites"):
        editor.ablate("fox", target="cat", locator="cross-attention")


def test_prompts_of_the_request_and_the_methods_own(sd1):
    editor, made = Editor(sd1), {}
    for prompts in ("bare", "expanded", "request"):
        edit = editor.ablate("dog", target="cat", aliases=["pup"], updater=UCE(prompts=prompts))
        made[prompts] = next(iter(edit.delta.diagnostics.values())).pairs
        edit.revert()
    assert made == {"bare": 2, "expanded": 12, "request": 16}


def test_every_token_of_the_subject_may_be_paired(sd1):
    rule = CrossAttentionLocator(tokens=TokenRule.ALL_SUBJECT)
    goal = reading(sd1, "cat")
    assert len(sd1.tokenizer("Snoopy").input_ids) > 4
    Editor(sd1).ablate("Snoopy", target="cat", updater=UCE(lam=1e-6), locator=rule)
    for position in range(1, len(sd1.tokenizer("Snoopy").input_ids) - 1):
        assert gap(reading(sd1, "Snoopy", position), goal) < 1e-2


def test_every_position_with_preserved_names(sd1):
    """TIME's pairing with UCE's preserved names: held at every position, and more so with a larger scale."""
    positions, moved = range(1, 77), []
    before = torch.stack([reading(sd1, "fox", position) for position in positions])
    for scale in (0.0, 1.0, 100.0):
        updater = UCE(pairing="every", preserve_scale=scale, pair_tol=0)
        edit = Editor(sd1).ablate("dog", target="cat", preserve=["fox"], updater=updater)
        assert {(data.pairs, data.preserved) for data in edit.delta.diagnostics.values()} == {(77, 77)}
        moved.append(gap(torch.stack([reading(sd1, "fox", position) for position in positions]), before))
        edit.revert()
    assert moved[0] > 2 * moved[1] > 4 * moved[2] > 0


def test_strength_scales_the_change(sd1):
    editor = Editor(sd1)
    edit = editor.ablate("dog", target="cat", updater="uce")
    half = editor.run([edit.requests[0].model_copy(update={"strength": 0.5})], updater="uce")
    for site, change in edit.delta:
        assert gap(half.delta.factors[site].dense(), 0.5 * change.dense()) < 1e-6
        assert gap((edit * 0.5).delta.factors[site].dense(), 0.5 * change.dense()) < 1e-6


@pytest.mark.parametrize("updater", [UCE(), LocoEdit()])
def test_edits_compose_and_come_apart(sd1, updater, tmp_path):
    editor = Editor(sd1)
    where = CrossAttentionLocator()
    first = editor.ablate("dog", target="cat", preserve=["owl", "fox"], updater=updater, locator=where)
    second = editor.update("fox", "bird", updater=updater, locator=where)
    whole = compose([second.load(second.save(tmp_path / "second")), first])
    together = editor.run([*first.requests, *second.requests], updater=updater, locator=where)
    for site, change in whole.delta:
        assert gap(change.dense(), together.delta.factors[site].dense()) < 1e-6
        alone = first.delta.factors[site].dense() + second.delta.factors[site].dense()
        assert gap(alone, change.dense()) > 1e-4  # control: adding is something else
    assert whole.requests[0].preserve == ("owl",)
    apart = whole.without("fox")
    fresh = editor.ablate("dog", target="cat", preserve=["owl"], updater=updater, locator=where)
    for site, change in apart.delta:
        assert torch.equal(change.up, fresh.delta.factors[site].up)


def test_time_does_not_compose(sd1):
    editor = Editor(sd1)
    edits = [editor.ablate(name, target="cat", updater="time") for name in ("dog", "fox")]
    assert not edits[0].delta.pairs
    with pytest.raises(NotComposableError, match="keeps none"):
        compose(edits)
    with pytest.raises(NotComposableError, match="does not solve from stored pairs"):
        TIME().solve_pairs({})
    both = editor.ablate(["dog", "fox"], target="cat", updater="time")  # one solve of both is possible
    assert len(both.requests) == 2


@pytest.mark.parametrize("updater", [UCE(), UCE(pairing="every")])
def test_an_object_given_two_meanings_is_refused(sd1, updater):
    requests = [make_request(subject="dog", target="cat"), make_request(subject="Dog's", target="bird")]
    requests[1] = requests[1].model_copy(update={"subject": "dog", "aliases": ()})
    backend = Editor(sd1).backend
    location = CrossAttentionLocator().locate(backend, requests)
    with pytest.raises(ContradictionError, match="different values"):
        updater.solve(backend, requests, location)


def test_what_cannot_be_is_said(sd1):
    editor, before = Editor(sd1), model_state(sd1)
    with pytest.raises(RequestError, match="no token pairs are left"):
        editor.ablate("dog", target="cat", updater=UCE(erase_scale=0))
    with pytest.raises(RequestError, match="neither keys nor values"):
        editor.ablate("dog", target="cat", updater="uce", locator=CrossAttentionLocator(keys=False, values=False))
    with pytest.raises(UnsupportedModelError, match=r"no such cross-attention layers.*blocks 7 to 3"):
        editor.ablate("dog", target="cat", updater="uce", locator=CrossAttentionLocator(first=7))
    with pytest.raises(NoOpError, match="already does"):
        backend = editor.backend
        same = make_request(subject="dog", target="cat").model_copy(update={"target": "dog"})
        UCE().solve(backend, [same], CrossAttentionLocator().locate(backend, []))
    with pytest.raises(RequestError, match="do not read the same text states"):
        mixed = FixedLocator().locate(backend, []).sites + CrossAttentionLocator().locate(backend, []).sites
        location = CrossAttentionLocator().locate(backend, [])
        UCE().solve(backend, [make_request(subject="dog", target="cat")], location.__class__(mixed, *_rest(location)))
    assert model_state(sd1) == before


def _rest(location):
    return location.tokens, location.method, location.reference


def test_weights_that_are_not_finite_are_refused(sd1):
    sd1.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"mid_block.*to_v is not finite"):
        Editor(sd1).ablate("dog", target="cat", updater="uce")


def test_a_model_without_a_unet_has_nothing_to_edit(sd1):
    sd1.unet = None
    with pytest.raises(UnsupportedModelError, match="no such cross-attention layers"):
        Editor(sd1).ablate("dog", target="cat", updater="uce")
