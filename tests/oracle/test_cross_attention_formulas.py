"""Proves that `uce`, `time` and `locoedit` solve their published formulas, in float64 to 1e-9, on states that this file
reads itself: the whole text encoder on padded prompts, tokens counted as the published scripts count them (the last
token is the one before the end of the attention mask; TIME's greedy search for equal tokens), inverses in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffedit.backends.loading import load_model
from diffedit.backends.stable_diffusion import SD1, SD2
from diffedit.delta import LowRank
from diffedit.linalg.solve import ridge_factors
from diffedit.locators.cross_attention import CrossAttentionLocator
from diffedit.pairs import Held, Pairs, Wanted
from diffedit.request import make_request
from diffedit.site import EditSite, Role
from diffedit.testing import unchanged
from diffedit.updaters.cross_attention import TIME, UCE, LocoEdit, shared_factors
from tests.oracle.strategies import close
from tests.tiny import build

TOL = 1e-9


@pytest.fixture(params=["sd1", "sd2"])
def pipe(request, tokenizer_folder):
    """A tiny pipeline in float64."""
    return build.pipeline(tokenizer_folder, family=request.param).to(dtype=torch.float64)


def backend_of(pipe):
    return (SD1 if SD1.accepts(pipe) else SD2)(load_model(pipe))


def read(pipe, prompts) -> tuple[np.ndarray, list[list[int]]]:
    """[b, 77, d] final states, and each prompt's token ids without padding."""
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipe.text_encoder(ids)[0].numpy()
    return states, [pipe.tokenizer(prompt).input_ids for prompt in prompts]


def last(pipe, prompts) -> np.ndarray:
    states, ids = read(pipe, prompts)
    return np.array([state[len(row) - 2] for state, row in zip(states, ids, strict=True)])


def published(weight, erased, goals, kept, lam, erase=1.0, preserve=1.0) -> np.ndarray:
    """W' = mat1 mat2^-1 with mat1 = lam W + sum v* k^T and mat2 = lam I + sum k k^T, minus W."""
    top, bottom = lam * weight, lam * np.eye(weight.shape[1])
    for k, t in zip(erased, goals, strict=True):
        top, bottom = top + erase * np.outer(weight @ t, k), bottom + erase * np.outer(k, k)
    for q in kept:
        top, bottom = top + preserve * np.outer(weight @ q, q), bottom + preserve * np.outer(q, q)
    return top @ np.linalg.inv(bottom) - weight


def compare(pipe, updater, requests, formula) -> None:
    """The updater's solve at every site, in float64 and as the edit holds it, against `formula(weight)`."""
    backend = backend_of(pipe)
    location = CrossAttentionLocator().locate(backend, requests)
    with unchanged(pipe, updater.name):
        solved = shared_factors(updater.pairs(backend, requests, location), updater.lam, updater.preserve_scale)
        delta = updater.solve(backend, requests, location)
    assert len(solved) == 8 and tuple(solved) == location.sites == delta.sites
    for site, solution in solved.items():
        wanted = formula(backend.weight(site).detach().numpy())
        assert close((solution.up @ solution.down).numpy(), wanted, TOL)
        assert close(delta.factors[site].dense().numpy(), wanted, 1e-5)
        assert np.linalg.norm(wanted) > 1e-3  # control: there is something to agree on


@pytest.mark.parametrize("prompts", ["bare", "expanded"])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (2.0, 0.25)])
def test_uce(pipe, prompts, scales):
    erase, preserve = scales
    names, targets, kept = ["dog", "Snoopy"], ["cat", "old owl"], ["fox", "apple"]
    templates = ["{}"] + [f"{word} of {{}}" for word in ("image", "photo", "portrait", "picture", "painting")]
    templates = templates[: 1 if prompts == "bare" else None]
    requests = [make_request(subject=n, target=t, preserve=kept) for n, t in zip(names, targets, strict=True)]
    k, t, q = (
        last(pipe, [template.format(name) for name in group for template in templates])
        for group in (names, targets, kept)
    )
    updater = UCE(erase_scale=erase, preserve_scale=preserve, prompts=prompts, pair_tol=0)
    compare(pipe, updater, requests, lambda w: published(w, k, t, q, 0.5, erase, preserve))


def test_uce_of_a_style(pipe):
    words = ("painting by", "art by", "artwork by", "picture by", "style of")
    prompts = ["{}"] + [f"{word} {{}}" for word in words]
    k, t = (last(pipe, [p.format(name) for p in prompts]) for name in ("Monet", "art"))
    request = make_request(subject="Monet", target="art", kind="style")
    compare(pipe, UCE(prompts="expanded", pair_tol=0), [request], lambda w: published(w, k, t, [], 0.5))


@pytest.mark.parametrize(("kind", "words"), [("style", "in the style of"), ("object", "of")])
def test_locoedit(pipe, kind, words):
    """W = (X^T X + lam I)^-1 (X^T Y + lam W0) with Y = X* W0, in the script's row convention."""
    heads = {"style": ("painting", "photo", "picture"), "object": ("image", "photo", "picture")}[kind]
    prompts = ["{}"] + [f"{head} {words} {{}}" for head in heads]
    x, goals = (last(pipe, [p.format(name) for p in prompts]) for name in ("dog", "cat"))

    def formula(weight):
        w0 = weight.T
        return np.linalg.solve(x.T @ x + 0.01 * np.eye(len(w0)), x.T @ goals @ w0 + 0.01 * w0).T - weight

    compare(pipe, LocoEdit(pair_tol=0), [make_request(subject="dog", target="cat", kind=kind)], formula)


def greedy(source: list[int], target: list[int]) -> list[int]:
    """TIME's partner of each of the 77 positions."""
    found, j = [], 0
    for token in source:
        while target[j] != token:
            j += 1
        found.append(j)
        j += 1
    found += range(j, 77)
    return (found + [76] * 77)[:77]


@pytest.mark.parametrize(
    ("subject", "target"), [("dog", "blue dog"), ("cat", "cat photo"), ("Snoopy", "a Snoopy cat"), ("cat", "cat cat")]
)
def test_time_of_a_subject_that_is_part_of_its_target(pipe, subject, target):
    request = make_request(subject=subject, target=target)
    heads = ("{}", "A photo of {}", "An image of {}", "A picture of {}")
    sources, goals = ([head.format(name) for head in heads] for name in (request.subject, request.target))
    (x, source_ids), (y, goal_ids) = read(pipe, sources), read(pipe, goals)
    k = x.reshape(-1, x.shape[-1])
    t = np.concatenate([y[i][greedy(a, b)] for i, (a, b) in enumerate(zip(source_ids, goal_ids, strict=True))])
    assert len(k) == 4 * 77
    compare(pipe, TIME(pair_tol=0), [request], lambda w: published(w, k, t, [], 0.1))


def test_time_of_another_subject_pairs_from_the_last_token(pipe):
    """What the script cannot do: the subject from its end, later positions by offset."""
    x, _ = read(pipe, ["dog"])
    y, (ids,) = read(pipe, ["old owl"])
    assert len(ids) - 2 > 1
    k = x[0]
    t = y[0][[0, len(ids) - 2] + [min(len(ids) - 3 + i, 76) for i in range(2, 77)]]
    request = make_request(subject="dog", target="old owl")
    compare(pipe, TIME(prompts="bare", pair_tol=0), [request], lambda w: published(w, k, t, [], 0.1))


def test_the_answer_is_optimal_and_a_perturbed_one_is_not(pipe):
    """First order by autograd of the objective as the papers write it; second by random directions."""
    backend, names, lam, erase, preserve = backend_of(pipe), ("dog", "cat", "fox"), 0.3, 2.0, 0.5
    request = make_request(subject="dog", target="cat", preserve=["fox"])
    location = CrossAttentionLocator().locate(backend, [request])
    updater = UCE(lam=lam, erase_scale=erase, preserve_scale=preserve, pair_tol=0)
    solved = shared_factors(updater.pairs(backend, [request], location), lam, preserve)
    k, t, q = (torch.from_numpy(last(pipe, [name])) for name in names)
    generator = torch.Generator().manual_seed(0)
    for site, solution in solved.items():
        w0 = backend.weight(site).detach()

        def objective(w, w0=w0):
            wanted = erase * ((k @ w.T - t @ w0.T) ** 2).sum() + preserve * ((q @ (w - w0).T) ** 2).sum()
            return wanted + lam * ((w - w0) ** 2).sum()

        w = (w0 + solution.up @ solution.down).requires_grad_()
        (slope,) = torch.autograd.grad(objective(w), w)
        start = w0.clone().requires_grad_()
        (before,) = torch.autograd.grad(objective(start), start)
        assert float(slope.norm()) <= 1e-9 * float(before.norm())
        best = float(objective(w.detach()))
        for _ in range(5):
            step = torch.randn(w.shape, generator=generator, dtype=torch.float64)
            assert float(objective(w.detach() + 1e-3 * step / step.norm() * w0.norm())) > best


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 6),
    m=st.integers(0, 6),
    d=st.integers(2, 10),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    split=st.booleans(),
)
def test_one_factorisation_for_all_sites_is_one_solve_per_site(seed, n, m, d, sizes, split):
    """Also where some sites have keys of their own."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    common, kept = (draw(n, d), draw(n, d)), draw(m, d)
    pairs = {}
    for i, size in enumerate(sizes):
        site = EditSite("unet", f"down_blocks.{i}.attn2.to_k", i, Role.UNET_CROSS_ATTN_K, size, d)
        keys = common[i % 2 if split else 0]
        held = (Held("x", "0" * 16, kept, m),) if m else ()
        pairs[site] = Pairs((Wanted(keys, draw(n, size), n, "0" * 16),), held, 1.0)
    for site, found in shared_factors(pairs, 0.3, 2.0).items():
        keys, residuals, held = pairs[site].stack()
        weights = held.new_full((len(held),), 2.0)
        alone = ridge_factors(keys, residuals, lam=0.3, preserve=held, preserve_weights=weights)
        assert close(LowRank(found.up, found.down).dense().numpy(), (alone.up @ alone.down).numpy(), 1e-11)
        assert abs(found.residual - alone.residual) < 1e-11 and abs(found.preserve_drift - alone.preserve_drift) < 1e-11
        assert found.condition == pytest.approx(alone.condition) and found.effective_rank == alone.effective_rank
