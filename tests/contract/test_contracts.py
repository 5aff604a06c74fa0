"""Proves that every registered backend, locator and updater keeps its contract on every layout, and that the suite
which says so notices each way of breaking it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from diffedit import registry, testing
from diffedit.backends.loading import load_model
from diffedit.backends.stable_diffusion import SD1
from diffedit.delta import Delta, LowRank
from diffedit.interfaces import Activations
from diffedit.locators.fixed import FixedLocator
from diffedit.request import make_request
from diffedit.site import Location, Role, TokenRule
from diffedit.testing import ContractError, check_backend, check_locator, check_updater, model_state, unchanged
from diffedit.updaters.closed_form import QuickFix

REQUESTS = [make_request(subject="dog", target="cat", preserve=["fox"])]
BUILT_IN = registry.BUILT_IN
# The contract is the same after two training steps as after two hundred.
SHORT = {"steps": 2, "evaluations": 1, "batch_size": 2}
QUICK = {
    "esd": {**SHORT, "sampling_steps": 2},
    "esd-u": {**SHORT, "sampling_steps": 2},
    "concept-ablation": {**SHORT, "sampling_steps": 2, "anchors": 2},
    "finetune-text-encoder": SHORT,
    "emcid": {"steps": 2, "captions": 20, "pictures": 2, "sampling_steps": 2},
}


@pytest.fixture
def backend(pipeline, family):
    return registry.get("backends", family)(load_model(pipeline))


@pytest.fixture
def plain(sd1):
    return SD1(load_model(sd1))


def test_every_family_has_a_backend_and_only_one(pipeline, family):
    assert [name for name in BUILT_IN["backends"] if registry.get("backends", name).accepts(pipeline)] == [family]


def test_backends(backend):
    check_backend(backend, "a photo of a small dog in the sun", "dog")


@pytest.mark.parametrize("name", BUILT_IN["locators"])
def test_locators(backend, name):
    location = check_locator(registry.build("locators", name), backend, REQUESTS)
    assert location.sites[0] in backend.sites(*Role)


@pytest.mark.parametrize("name", BUILT_IN["updaters"])
def test_updaters(backend, name):
    delta = check_updater(registry.configure("updaters", name, QUICK.get(name, {})), backend, REQUESTS)
    assert delta.sites


def broken(base, **methods):
    """A subclass with some methods replaced."""
    return type("Broken", (base,), {"__module__": __name__, **methods})


def _writes(self, backend, requests):
    backend.weight(backend.sites()[0]).data[0, 0] += 1
    return FixedLocator.locate(self, backend, requests)


def _leaves_a_hook(self, backend, requests):
    backend._module(backend.sites()[0]).register_forward_hook(lambda *a: None)
    return FixedLocator.locate(self, backend, requests)


def _flips_the_mode(self, backend, requests):
    backend.model.pipeline.unet.train()
    return FixedLocator.locate(self, backend, requests)


def _draws(self, backend, requests):
    torch.rand(1)
    return FixedLocator.locate(self, backend, requests)


def _wavers(self, backend, requests):
    sites = backend.sites()
    Waver.turn += 1
    return Location(sites[Waver.turn % 2 : Waver.turn % 2 + 1], TokenRule.EOS, "x", "y")


class Waver:
    turn = 0


def _nowhere(self, backend, requests):
    return Location((), TokenRule.EOS, "x", "y")


def _unsorted(self, backend, requests):
    return Location(backend.sites()[1::-1], TokenRule.EOS, "x", "y")


def _elsewhere(self, backend, requests):
    site = dataclasses.replace(backend.sites()[0], d_in=999)
    return Location((site,), TokenRule.EOS, "x", "y")


def _too_many_scores(self, backend, requests):
    return Location(backend.sites()[:1], TokenRule.EOS, "x", "y", (1.0, 2.0))


BAD_LOCATORS = {
    "writes a weight": (dict(locate=_writes), "changed the model"),
    "leaves a hook": (dict(locate=_leaves_a_hook), "changed the model"),
    "flips a mode": (dict(locate=_flips_the_mode), "changed the model"),
    "draws random numbers": (dict(locate=_draws), "global random generator"),
    "is not deterministic": (dict(locate=_wavers), "another location"),
    "finds nothing": (dict(locate=_nowhere), "needs a site"),
    "does not sort": (dict(locate=_unsorted), "not sorted"),
    "invents a site": (dict(locate=_elsewhere), "does not exist"),
    "scores too much": (dict(locate=_too_many_scores), "do not pair"),
    "has no name": (dict(name=""), "class attribute 'name'"),
    "has no reference": (dict(reference=None), "class attribute 'reference'"),
    "forgets a setting": (dict(model_dump=lambda self, **kw: {"layer": 2}), "do not survive"),
}


@pytest.mark.parametrize(("methods", "promise"), BAD_LOCATORS.values(), ids=BAD_LOCATORS.keys())
def test_a_broken_locator_is_caught(plain, methods, promise):
    with pytest.raises(ContractError, match=promise):
        check_locator(broken(FixedLocator, **methods)(), plain, REQUESTS)


def _solved(self, backend, requests, location):
    return QuickFix.solve(self, backend, requests, location)


def _zero(self, backend, requests, location):
    return 0.0 * QuickFix.solve(self, backend, requests, location)


def _empty(self, backend, requests, location):
    return Delta({})


def _random(self, backend, requests, location):
    generator = torch.Generator()
    generator.seed()
    site = location.sites[0]
    return Delta({site: LowRank(torch.randn(site.d_out, 1, generator=generator), torch.ones(1, site.d_in))})


def _not_finite(self, backend, requests, location):
    return float("nan") * QuickFix.solve(self, backend, requests, location)


def _strays(self, backend, requests, location):
    other = backend.sites(location.sites[0].role)[-1]
    return Delta({other: next(iter(QuickFix.solve(self, backend, requests, location).factors.values()))})


def _edits_in_place(self, backend, requests, location):
    backend.weight(location.sites[0]).data.mul_(2)
    return QuickFix.solve(self, backend, requests, location)


BAD_UPDATERS = {
    "writes a weight": (dict(solve=_edits_in_place), ContractError, "changed the model"),
    "returns zero": (dict(solve=_zero), ContractError, "change is zero"),
    "returns nothing": (dict(solve=_empty), ContractError, "edits no site"),
    "is random": (dict(solve=_random), ContractError, "gives another change"),
    "is not finite": (dict(solve=_not_finite), Exception, "not finite"),
    "edits another site": (dict(solve=_strays), ContractError, "was not given"),
    "has no roles": (dict(roles=("conv",)), ContractError, "roles do not exist"),
}


@pytest.mark.parametrize(("methods", "error", "promise"), BAD_UPDATERS.values(), ids=BAD_UPDATERS.keys())
def test_a_broken_updater_is_caught(plain, methods, error, promise):
    with pytest.raises(error, match=promise):
        check_updater(broken(QuickFix, **methods)(), plain, REQUESTS)


def _tampered(**parts):
    """A `capture` whose result is tampered with: name -> function of the tensor."""

    def capture(self, prompts, sites, *, padded=False):
        seen = SD1.capture(self, prompts, sites, padded=padded)
        fields = {name: getattr(seen, name) for name in ("inputs", "outputs", "streams")}
        for name, change in parts.items():
            fields[name] = {site: change(value, self, padded, len(sites)) for site, value in fields[name].items()}
        return Activations(seen.tokens, **fields)

    return capture


BAD_BACKENDS = {
    "lies about the shape": (
        dict(sites=lambda self, *r: tuple(dataclasses.replace(s, d_out=31) for s in SD1.sites(self, *r))),
        Exception,
        "shape",
    ),
    "lists a site twice": (dict(sites=lambda self, *r: SD1.sites(self, *r)[:1] * 2), ContractError, "listed twice"),
    "lists no site": (dict(sites=lambda self, *r: ()), ContractError, "missing"),
    "does not accept itself": (dict(accepts=classmethod(lambda cls, p: False)), ContractError, "does not accept"),
    "misplaces the subject": (
        dict(span=lambda self, p, s, o=None: dataclasses.replace(SD1.span(self, p, s, o), start=0)),
        ContractError,
        "not inside the prompt",
    ),
    "captures the wrong output": (
        dict(capture=_tampered(outputs=lambda x, *_: x + 1)),
        ContractError,
        "not the layer's output",
    ),
    "captures the wrong input": (dict(capture=_tampered(inputs=lambda x, *_: x[:, :-1])), ContractError, "inputs have"),
    "captures the wrong stream": (dict(capture=_tampered(streams=lambda x, *_: x[:1])), ContractError, "streams have"),
    "stops too early": (
        dict(capture=_tampered(inputs=lambda x, b, padded, n: x + (1.0 if n == 1 else 0.0))),
        ContractError,
        "stopping early",
    ),
    "attends to padding": (
        dict(capture=_tampered(inputs=lambda x, b, padded, n: x + (1.0 if padded else 0.0))),
        ContractError,
        "padding changes",
    ),
    "draws random numbers": (
        dict(features=lambda self, p: SD1.features(self, p) * torch.rand(1)),
        ContractError,
        "global random generator",
    ),
    "has no digest": (dict(fingerprints=lambda self: {"architecture": "clip"}), ContractError, "no SHA-256"),
    "pools all prompts": (dict(features=lambda self, p: torch.ones(2, 3)), ContractError, "features have"),
}


@pytest.mark.parametrize(("methods", "error", "promise"), BAD_BACKENDS.values(), ids=BAD_BACKENDS.keys())
def test_a_broken_backend_is_caught(sd1, methods, error, promise):
    with pytest.raises(error, match=promise):
        check_backend(broken(SD1, **methods)(load_model(sd1)), "a photo of a dog", "dog")


def test_unchanged_sees_one_bit_of_one_weight_anywhere(sd1):
    with pytest.raises(ContractError, match=r"somebody changed the model: \['vae\."), unchanged(sd1, "somebody"):
        next(sd1.vae.parameters()).data.view(torch.uint8).view(-1)[0] ^= 1
    with unchanged(sd1, "nobody"):
        sd1.text_encoder(torch.tensor([[1, 2]]))


def test_model_state_covers_every_part(sd1):
    assert {key.split(".")[0] for key in model_state(sd1)} == {"text_encoder", "unet", "vae"}
    assert issubclass(testing.ContractError, AssertionError)
