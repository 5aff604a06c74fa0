"""The contract suite: what every backend, locator and updater must keep, for our tests and for plugin authors'.

    from diffedit.testing import check_updater

    def test_my_updater(backend):
        check_updater(MyUpdater(), backend, [make_request(subject="dog", target="cat")])

Each function raises `ContractError` (an `AssertionError`, so that test runners show it) naming the broken promise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from diffedit.delta import Delta
from diffedit.interfaces import Backend, Locator, Plugin, Updater
from diffedit.ledger import tensor_hash
from diffedit.request import Request
from diffedit.site import Location, Role, TokenRule


class ContractError(AssertionError):
    """A plugin breaks a promise of `diffedit.interfaces`."""


def model_state(pipeline: Any) -> dict[str, str]:
    """Hashes of every weight and buffer of a pipeline, the number of hooks and the training flag of every module."""
    state: dict[str, str] = {}
    for name, part in sorted(pipeline.components.items()):
        if not isinstance(part, torch.nn.Module):
            continue
        for key, tensor in part.state_dict().items():
            state[f"{name}.{key}"] = tensor_hash(tensor)
        for key, module in part.named_modules():
            hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
            state[f"{name}.{key} hooks and mode"] = f"{hooks} {module.training}"
    return state


@contextmanager
def unchanged(pipeline: Any, who: str) -> Iterator[None]:
    """Raise `ContractError` if the block changes a weight, hooks, a mode or the global random state."""
    before, random = model_state(pipeline), torch.get_rng_state()
    yield
    after = model_state(pipeline)
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    _require(not changed, f"{who} changed the model", changed[:5])
    _require(torch.equal(random, torch.get_rng_state()), f"{who} drew from the global random generator", "torch")


def check_backend(backend: Backend, prompt: str, subject: str) -> None:
    """A backend lists sorted sites, finds spans, captures what the layer really computes, and changes nothing."""
    pipeline = backend.model.pipeline
    _require(type(backend).accepts(pipeline), "the backend does not accept its own model", backend.name)
    sites = backend.sites()
    _require(len(sites) > 0 and len(set(sites)) == len(sites), "sites are missing or listed twice", len(sites))
    with unchanged(pipeline, "the backend"):
        span = backend.span(prompt, subject)
        _require(0 < span.start < span.stop <= span.eos, "the span is not inside the prompt", span)
        seen = backend.capture([prompt, prompt], sites)
        for site in sites:
            weight, bias = backend.weight(site), backend.bias(site)
            _require(tuple(weight.shape) == (site.d_out, site.d_in), "a site's shape is not its weight's", site.name)
            x, y = seen.inputs[site], seen.outputs[site]
            _require(x.shape == (2, seen.tokens.shape[1], site.d_in), "inputs have a wrong shape", site.name)
            _require(seen.streams[site].shape == y.shape, "streams have a wrong shape", site.name)
            expected = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            close = torch.allclose(expected.float(), y.float(), rtol=1e-2, atol=1e-3)
            _require(close, "captured output is not the layer's output of the captured input", site.name)
        early = backend.capture([prompt], sites[:1])
        same = torch.allclose(early.inputs[sites[0]].float(), seen.inputs[sites[0]][:1].float(), rtol=1e-3, atol=1e-4)
        _require(same, "stopping early changes what is captured", sites[0].name)
        padded = backend.capture([prompt], sites[:1], padded=True).inputs[sites[0]]
        close = torch.allclose(padded[:, span.last].float(), early.inputs[sites[0]][:, span.last].float(), atol=1e-3)
        _require(close, "padding changes the subject's key", sites[0].name)
        _require(backend.features([prompt]).shape[0] == 1, "features have a wrong shape", prompt)
        _require(
            all(len(digest) == 64 for digest in backend.fingerprints().values()), "a fingerprint is no SHA-256", ""
        )


def check_locator(locator: Locator, backend: Backend, requests: Sequence[Request]) -> Location:
    """A locator names itself, is deterministic, returns sites that the backend has, and changes nothing."""
    _check_plugin(locator)
    with unchanged(backend.model.pipeline, f"the locator {locator.name}"):
        location = locator.locate(backend, requests)
        again = locator.locate(backend, requests)
    _require(location == again, "the same request gives another location", location)
    _require(len(location.sites) > 0, "a location needs a site", location)
    _require(list(location.sites) == sorted(location.sites), "sites are not sorted", location.sites)
    _require(set(location.sites) <= set(backend.sites(*Role)), "a located site does not exist", location.sites)
    _require(len(location.scores) in (0, len(location.sites)), "scores do not pair with sites", location.scores)
    return location


def check_updater(updater: Updater, backend: Backend, requests: Sequence[Request]) -> Delta:
    """An updater names itself, is deterministic, returns a finite change that is not zero, and changes nothing."""
    _check_plugin(updater)
    sites = tuple(site for site in backend.sites(*updater.roles) if site.layer == 0)[:1]
    _require(len(sites) == 1, "the updater's roles do not exist in the backend", updater.roles)
    location = Location(sites, TokenRule.LAST_SUBJECT, "contract", "diffedit.testing")
    with unchanged(backend.model.pipeline, f"the updater {updater.name}"):
        delta = updater.solve(backend, requests, location)
        again = updater.solve(backend, requests, location)
    _require(len(delta.sites) > 0, "the updater edits no site", location.sites)
    _require(set(delta.sites) <= set(location.sites), "the updater edits sites that it was not given", delta.sites)
    for site, change in delta:
        change.check_finite(site.name)
        _require(change.norm() > 0, "the change is zero", site.name)
        _require(torch.equal(change.up, again.factors[site].up), "the same request gives another change", site.name)
        _require(torch.equal(change.down, again.factors[site].down), "the same request gives another change", site.name)
    return delta


def _check_plugin(plugin: Plugin) -> None:
    for attribute in ("name", "reference"):
        value = getattr(type(plugin), attribute, None)
        _require(
            isinstance(value, str) and bool(value),
            f"a plugin needs a class attribute {attribute!r}",
            type(plugin).__name__,
        )
    copy = type(plugin).model_validate(plugin.model_dump(mode="json"))
    _require(copy == plugin, "settings do not survive being saved as JSON", type(plugin).__name__)


def _require(condition: bool, promise: str, value: object) -> None:
    if not condition:
        raise ContractError(f"{promise}: {value}")
