"""Proves that the updaters solve the published equation (Basu et al. 2023, eq. 9),

    W = (lam W' + sum v k^T) (lam I + sum k k^T)^-1,

on keys and values that this file captures itself: its own hooks, a full padded forward pass, positions counted from the
end-of-text token, and the dense formula in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffedit.backends.loading import load_model
from diffedit.backends.stable_diffusion import SD1
from diffedit.locators.fixed import FixedLocator
from diffedit.request import make_request
from diffedit.updaters.closed_form import QuickFixPublished
from tests.tiny import build

PUBLISHED_TEMPLATES = ("{}", "photo of {}", "image of {}", "picture of {}")


@pytest.fixture
def layer(sd1):
    return sd1.text_encoder.encoder.layers[0].self_attn.out_proj


def run(pipe, layer, prompts) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Inputs and outputs of the layer for every position of every prompt, and where each end-of-text token stands."""
    seen = {}
    handle = layer.register_forward_hook(lambda m, args, out: seen.update(x=args[0].detach(), y=out.detach()))
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        pipe.text_encoder(ids)
    handle.remove()
    return (
        seen["x"].double().numpy(),
        seen["y"].double().numpy(),
        ids.eq(pipe.tokenizer.eos_token_id).int().argmax(1).tolist(),
    )


def dense(layer, pairs, lam) -> np.ndarray:
    weight = layer.weight.detach().double().numpy()
    top, bottom = lam * weight, lam * np.eye(weight.shape[1])
    for k, v in pairs:
        top, bottom = top + np.outer(v, k), bottom + np.outer(k, k)
    return top @ np.linalg.inv(bottom) - weight


def solved(pipe, updater, request) -> np.ndarray:
    backend = SD1(load_model(pipe))
    location = FixedLocator().locate(backend, [request])
    (change,) = updater.solve(backend, [request], location).factors.values()
    return change.dense().numpy()


@pytest.mark.parametrize(("subject", "target"), [("dog", "cat"), ("Snoopy", "dog"), ("dog", "old owl")])
def test_quickfix_with_the_papers_values(sd1, layer, subject, target):
    """Last subject token (the one before end-of-text, for these templates), bias counted once."""
    request = make_request(subject=subject, target=target)
    prompts = [[prompt for prompt, _ in request.render(phrase)] for phrase in (subject, target)]
    (x, _, ends), (_, y, goals) = (run(sd1, layer, group) for group in prompts)
    bias = layer.bias.detach().double().numpy()
    pairs = [(x[i, ends[i] - 1], y[i, goals[i] - 1] - bias) for i in range(len(ends))]
    wanted = dense(layer, pairs, 0.01)
    found = solved(sd1, build.plain(values="module", pair_tol=0), request)
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)
    with_bias = dense(layer, [(k, v + bias) for k, v in pairs], 0.01)
    assert np.linalg.norm(found - with_bias) > 1e-2 * np.linalg.norm(wanted)  # control: the quirk would show


@pytest.mark.parametrize(("subject", "target"), [("dog", "cat"), ("Snoopy", "dog"), ("dog", "old owl")])
def test_quickfix_published_pairs_every_later_position_and_counts_the_bias_twice(sd1, layer, subject, target):
    prompts = [[t.format(phrase) for t in PUBLISHED_TEMPLATES] for phrase in (subject, target)]
    (x, _, ends), (_, y, goals) = (run(sd1, layer, group) for group in prompts)
    pairs = [
        (x[i, ends[i] - 1 + step], y[i, min(goals[i] - 1 + step, 76)])
        for i in range(len(ends))
        for step in range(77 - (ends[i] - 1))
    ]
    assert len(pairs) == sum(78 - end for end in ends)
    wanted = dense(layer, pairs, 0.01)
    found = solved(sd1, QuickFixPublished(), make_request(subject=subject, target=target))
    assert np.linalg.norm(found - wanted) <= 1e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize("lam", [1e-4, 1.0])
def test_weights_of_token_kinds_and_preserve_keys(sd1, layer, lam):
    """D = R^T S K (lam I + K^T S K + Q^T P Q)^-1; preserve keys weigh as the pairs of their kind, times 3."""
    request = make_request(subject="dog", target="cat", preserve=["fox", "owl"], templates=["a {}", "the {}"])
    (x, _, ends), (_, y, goals) = (run(sd1, layer, [p for p, _ in request.render(n)]) for n in ("dog", "cat"))
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    keys, values, scale = [], [], []
    for i in range(2):
        for back, s in ((1, 2.0), (0, 0.5)):
            keys.append(x[i, ends[i] - back])
            values.append(y[i, goals[i] - back] - bias)
            scale.append(s)
    keys, values, s = np.array(keys), np.array(values), np.diag(scale)
    kept = [run(sd1, layer, [p for p, _ in request.render(n)]) for n in request.preserve]
    q, e = (np.array([x[i, ends[i] - back] for x, _, ends in kept for i in range(2)]) for back in (1, 0))
    gram = lam * np.eye(len(weight)) + keys.T @ s @ keys + 3.0 * (2.0 * q.T @ q + 0.5 * e.T @ e)
    wanted = (values - keys @ weight.T).T @ s @ keys @ np.linalg.inv(gram)
    updater = build.plain(
        lam=lam, values="module", pair_tol=0, subject_weight=2.0, eos_weight=0.5, padding_weight=0, preserve_weight=3.0
    )
    assert np.linalg.norm(solved(sd1, updater, request) - wanted) <= 1e-5 * np.linalg.norm(wanted)
