"""`emcid` on tiny pipelines: the spread is MEMIT's formula, computed here densely on a copy whose weights are really
edited; the searched states are reached as far as the ridge allows; the model stays as it is."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch

from diffedit import Editor, compose
from diffedit.delta import LowRank
from diffedit.errors import NoOpError, NotComposableError, RequestError, UnsupportedModelError
from diffedit.locators.text_mlp_range import TextMLPRangeLocator
from diffedit.request import make_request
from diffedit.site import EditSite, Role, TokenRule
from diffedit.testing import model_state, unchanged
from diffedit.updaters import emcid as emcid_module
from diffedit.updaters.emcid import EMCID
from diffedit.updaters.everyday import second_moment
from diffedit.updaters.finetune.distil import NoiseMatch
from diffedit.updaters.layers import edited
from diffedit.updaters.spread import Balance, Concept, mean_states, spread
from diffedit.updaters.steering import Descent, Steering
from tests.finetune.conftest import listening
from tests.oracle.strategies import close
from tests.tiny import build, xl

TEXT = EMCID(steps=8, captions=30, noise_weight=0.0)
ALL = TextMLPRangeLocator(last=2)
PROMPTS = {"dog": ("a dog", "the dog in a"), "pig": ("a pig", "the pig in a"), "fox": ("a fox", "the fox in a")}


def root(pipe):
    return getattr(pipe.text_encoder, "text_model", pipe.text_encoder)


def concepts(backend, *names):
    return [
        Concept(PROMPTS[name], tuple(backend.span(prompt, name).last for prompt in PROMPTS[name])) for name in names
    ]


def asked(**fields):
    return make_request(**{"subject": "dog", "target": "cat", "templates": ("a photo of a {}", "the {}"), **fields})


def read(pipe, layer, last, wanted):
    """Keys of a layer and states after another, by hooks and the encoder's own hidden states."""
    keys, states = [], []
    for concept in wanted:
        k, h = [], []
        for prompt, at in zip(concept.prompts, concept.positions, strict=True):
            seen = []
            handle = (
                root(pipe).encoder.layers[layer].mlp.fc2.register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0]))
            )
            with torch.no_grad():
                ids = pipe.tokenizer(prompt, return_tensors="pt").input_ids
                hidden = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
            handle.remove()
            k.append(seen[0][0, at].numpy())
            h.append(hidden[last + 1][0, at].numpy())
        keys.append(np.mean(k, 0))
        states.append(np.mean(h, 0))
    return np.stack(keys), np.stack(states)


@pytest.fixture
def solved(pipeline):
    """A spread over layers 0 and 1 in float64, with everything it was given."""
    pipeline.text_encoder.double()
    backend = Editor(pipeline).backend
    sites = sorted(TextMLPRangeLocator().locate(backend, []).sites)
    assert [site.layer for site in sites] == [0, 1]
    names, kept = concepts(backend, "dog", "pig"), concepts(backend, "fox")
    roots = {site: second_moment(backend, site, 30).root(1e-3) for site in sites}
    targets = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    balance = Balance(edit=0.6, moment=3.0, preserve=2.0)
    with unchanged(pipeline, "spread"):
        found = spread(backend, sites, names, targets, kept, roots, balance)
    return pipeline, backend, sites, names, kept, roots, targets, balance, found


def test_the_spread_is_the_published_formula(solved):
    """Dense, in float64, on a copy of the model whose weights are written after every layer."""
    pipeline, _, sites, names, kept, roots, targets, balance, found = solved
    model = copy.deepcopy(pipeline)
    model.text_encoder.double()
    for done, site in enumerate(sites):
        k, h = read(model, site.layer, 1, names)
        q, _ = read(model, site.layer, 1, kept)
        residual = (targets.numpy() - h) / (len(sites) - done)
        c = (roots[site].T @ roots[site]).numpy()
        a = balance.moment * (1 - balance.edit) * c + balance.edit * k.T @ k + balance.preserve * q.T @ q
        change = balance.edit * residual.T @ k @ np.linalg.inv(a)
        assert close((found[site].up @ found[site].down).numpy(), change, 1e-9)
        with torch.no_grad():
            root(model).encoder.layers[site.layer].mlp.fc2.weight += torch.from_numpy(change)


def test_each_layer_is_optimal_and_every_other_change_is_worse(solved):
    _, backend, sites, names, kept, roots, targets, balance, found = solved
    first = LowRank(found[sites[0]].up, found[sites[0]].down)
    for done, (site, before) in enumerate(zip(sites, ({}, {sites[0]: first}), strict=True)):
        with edited(backend, before):
            keys, states = mean_states(backend, names, site, sites[-1])
            others, _ = mean_states(backend, kept, site, sites[-1])
        residual = (targets - states) / (len(sites) - done)

        def cost(change, site=site, keys=keys, others=others, residual=residual):
            missed = balance.edit * (change @ keys.T - residual.T).square().sum()
            everyday = balance.moment * (1 - balance.edit) * (change @ roots[site].T).square().sum()
            return missed + everyday + balance.preserve * (change @ others.T).square().sum()

        best = (found[site].up @ found[site].down).requires_grad_()
        (gradient,) = torch.autograd.grad(cost(best), [best])
        (scale,) = torch.autograd.grad(cost(zero := torch.zeros_like(best).requires_grad_()), [zero])
        assert float(gradient.norm()) < 1e-8 * float(scale.norm())
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            step = torch.randn(best.shape, dtype=torch.float64, generator=generator) * 1e-3
            assert cost(best.detach() + step) > cost(best.detach())


@pytest.mark.parametrize("edit", [0.999999, 0.1])
def test_the_states_are_reached_as_the_ridge_allows(sd1, edit):
    """Of an edit that the ledger really wrote; both concepts, and the residual was shared by both layers."""
    editor = Editor(sd1)
    updater = TEXT.model_copy(update={"edit_weight": edit, "moment_weight": 1e-3 if edit > 0.5 else 1e3})
    names = [
        Concept(("a dog",), (editor.backend.span("a dog", "dog").last,)),
        Concept(("a pig",), (editor.backend.span("a pig", "pig").last,)),
    ]
    last = ALL.locate(editor.backend, []).sites[1]
    _, before = mean_states(editor.backend, names, last, last)
    wanted = {}
    real = emcid_module.spread

    def keep(*args):
        wanted["states"] = args[3]
        return real(*args)

    emcid_module.spread = keep
    try:
        requests = [asked(templates=("a {}",)), asked(subject="pig", target="house", templates=("a {}",))]
        edit_made = editor.run(requests, updater=updater, locator="text-mlp-range")
    finally:
        emcid_module.spread = real
    _, after = mean_states(editor.backend, names, last, last)
    left = (after - wanted["states"]).norm(dim=1) / (before - wanted["states"]).norm(dim=1)
    assert bool((left < 1e-3).all()) if edit > 0.5 else bool((left > 0.5).all())
    changes = list(edit_made.delta.factors.values())
    assert len(changes) == 2 and all(change.rank == 2 and change.norm() > 0 for change in changes)


def test_an_edit_changes_its_layers_alone_and_reverts_to_the_bit(pipeline):
    editor, before = Editor(pipeline), model_state(pipeline)
    edit = editor.ablate("dog", target="cat", aliases=["pup"], updater=TEXT)
    after = model_state(pipeline)
    changed = sorted(key for key in before if before[key] != after[key])
    assert len(changed) == 2 and all(f"layers.{i}.mlp.fc2.weight" in key for i, key in enumerate(changed))
    assert edit.manifest.locator.name == "text-mlp-range" and all(c.rank == 2 for _, c in edit.delta)
    edit.revert()
    assert model_state(pipeline) == before
    with pytest.raises(NotComposableError, match="keeps none"):
        compose([edit])


def test_an_interrupt_between_two_layers_leaves_no_hook(sd1, monkeypatch):
    backend = Editor(sd1).backend
    before, left = model_state(sd1), iter([None, KeyboardInterrupt])

    def interrupted(*args):
        if error := next(left, KeyboardInterrupt):
            raise error
        return mean_states(*args)

    monkeypatch.setattr("diffedit.updaters.spread.mean_states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TEXT.solve(backend, [asked()], ALL.locate(backend, []))
    assert model_state(sd1) == before


def test_the_search_lowers_its_loss_and_strength_scales_what_it_found(sd1):
    backend = Editor(sd1).backend
    (site,) = TextMLPRangeLocator(first=0, last=0).locate(backend, []).sites
    steering, updater = Steering(backend, site), TEXT.model_copy(update={"steps": 40, "decay": 0.0})
    fact = steering.fact(asked(), "dog")
    aim = updater._aim(backend, fact, 0)
    how = Descent(40, 0.2, 0.0, 1.5)
    (present,) = mean_states(backend, [Concept(fact.prompts, fact.positions)], site, site)[1]
    found = steering.descend(fact.prompts, fact.positions, aim, float(present.norm()), how)
    assert found.before == pytest.approx(0.0, abs=1e-5) and found.after > 0.1 and found.steps == 40
    assert float(found.delta.norm()) <= 1.5 * float(present.norm()) * (1 + 1e-5)
    states = {s: updater._state(backend, steering, site, asked(strength=s), fact) - present for s in (1.0, 0.5)}
    assert torch.allclose(states[0.5], 0.5 * states[1.0]) and torch.allclose(states[1.0], found.delta, atol=1e-6)


def test_the_noise_loss_is_the_papers_and_moves_the_states(tokenizer_folder):
    pipe = listening(tokenizer_folder)
    backend, prompts, goals = Editor(pipe).backend, ["a dog", "the dog"], ["a cat", "the cat"]
    with unchanged(pipe, "the noise loss"):
        match = NoiseMatch(backend, prompts, goals, pictures=2, guidance=3.0, steps=2, seed=3)
        with torch.no_grad():
            source, goal = (pipe.encode_prompt(texts, "cpu", 1, False)[0] for texts in (prompts, goals))
            assert float(match(goal)) < 1e-12 < float(match(source))  # nothing is left once the states are the target's
        generator = copy.deepcopy(match._generator.get_state())
        loss = float(match(source).detach())
        match._generator.set_state(generator)
        view = match._pictures.view(2, match._generator)
        with torch.no_grad():
            mine = pipe.unet(view.latents, view.times, source[view.captions]).sample
            theirs = pipe.unet(view.latents, view.times, goal[view.captions]).sample
    assert loss == pytest.approx(float((mine - theirs).square().mean()), rel=1e-5)
    (site,) = TextMLPRangeLocator(first=0, last=0).locate(backend, []).sites
    updater = EMCID(text_weight=0.0, steps=25, pictures=4, sampling_steps=2, decay=0.0)
    steering = Steering(backend, site, padded=True)
    fact = steering.fact(asked(), "dog")
    size = float(mean_states(backend, [Concept(fact.prompts, fact.positions)], site, site)[1].norm())
    losses = []

    real = updater._aim(backend, fact, 0)

    def aim(seen):
        loss, near = real(seen)
        losses.append(float(loss.detach()))
        return loss, near

    steering.descend(fact.prompts, fact.positions, aim, size, Descent(25, 0.05, 0.0, 1.5))
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])  # every step has noise of its own


def test_the_whole_method_with_both_losses(tokenizer_folder):
    pipe = listening(tokenizer_folder, "sd2", "nested")
    editor, before = Editor(pipe), model_state(pipe)
    updater = EMCID(steps=2, captions=20, pictures=2, sampling_steps=2)
    edit = editor.run([asked(preserve=("fox",))], updater=updater)
    said = next(iter(edit.delta.diagnostics.values()))
    assert said.pairs == 1 and said.preserved == 1 and 0 < said.residual <= 1 and said.relative_norm > 0
    edit.revert()
    again = editor.run([asked(preserve=("fox",))], updater=updater)
    assert again.id == edit.id
    again.revert()
    assert model_state(pipe) == before


class Deep:
    """Sites of an encoder of some depth, as a locator asks for them."""

    name = "deep"

    def __init__(self, depth):
        self._sites = tuple(
            EditSite("text_encoder", f"text_model.encoder.layers.{i}.mlp.fc2", i, Role.TEXT_MLP_OUT, 8, 16)
            for i in range(depth)
        )

    def sites(self, *roles):
        return self._sites if Role.TEXT_MLP_OUT in roles else ()


@pytest.mark.parametrize(
    ("depth", "settings", "layers"),
    [
        (12, {}, range(11)),
        (12, {"start": 0.64}, range(7, 11)),
        (23, {}, range(21)),
        (6, {}, range(5)),
        (3, {}, range(2)),
        (2, {}, range(1)),
        (1, {}, range(1)),
        (12, {"first": 3, "last": 5}, range(3, 6)),
        (12, {"last": 2, "start": 0.64}, range(2, 3)),
    ],
)
def test_the_range_counts_in_shares_of_the_depth(depth, settings, layers):
    sites = TextMLPRangeLocator(**settings).locate(Deep(depth), []).sites
    assert {site.layer for site in sites} == set(layers) and list(sites) == sorted(sites)


def test_layers_are_edited_in_the_order_of_the_forward_pass(tokenizer_folder, monkeypatch):
    """As strings, layers.10 sorts before layers.2."""
    monkeypatch.setitem(build.TINY, "num_hidden_layers", 12)
    backend = Editor(build.pipeline(tokenizer_folder)).backend
    order = []
    real = emcid_module.spread
    monkeypatch.setattr(emcid_module, "spread", lambda b, sites, *a: order.extend(sites) or real(b, sites, *a))
    location = TextMLPRangeLocator().locate(backend, [])
    delta = TEXT.model_copy(update={"steps": 1, "captions": 5}).solve(backend, [asked()], location)
    assert [site.layer for site in order] == list(range(11)) and len(delta.sites) == 11


def test_what_cannot_be_is_said(sd1, tokenizer_folder, caplog):
    editor, before = Editor(sd1), model_state(sd1)
    with pytest.raises(RequestError, match="at the last token of the subject"):
        editor.ablate("dog", target="cat", updater=TEXT, locator=TextMLPRangeLocator(tokens=TokenRule.EOS))
    with pytest.raises(RequestError, match="nothing to match"):
        editor.ablate("dog", target="cat", updater=EMCID(text_weight=0.0, noise_weight=0.0))
    with pytest.raises(UnsupportedModelError, match="Choose layers from 0 to 2"):
        editor.ablate("dog", target="cat", updater=TEXT, locator=TextMLPRangeLocator(first=9, last=9))
    location = ALL.locate(editor.backend, [])
    with pytest.raises(NoOpError, match="already says"):
        TEXT.solve(editor.backend, [asked().model_copy(update={"target": "dog"})], location)
    with pytest.raises(RequestError, match="no target yet"):
        TEXT.solve(editor.backend, [asked().model_copy(update={"target": None})], location)
    with pytest.raises(UnsupportedModelError, match="emcid edits models with one text encoder"):
        Editor(xl.pipeline(tokenizer_folder)).ablate("dog", target="cat", updater=TEXT)
    assert model_state(sd1) == before
    with caplog.at_level(logging.WARNING, "diffedit"):
        TEXT.model_copy(update={"steps": 1, "learning_rate": 1e-4}).solve(editor.backend, [asked()], location)
    assert "has come 0% of the way to 'cat'" in caplog.text
