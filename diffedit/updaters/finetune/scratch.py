"""Training without touching the model: trained copies stand in for the live weights, and only while they are used.

The live parameters are never written. Each edit site gets a copy of its weight; inside `trained()` the modules hold the
copies, outside they hold their own parameter objects, so that the original model (the frozen teacher of every method
here) costs no second model in memory. Gradients are recorded for the copies alone. When the scope ends, for whatever
reason, every module holds its own parameter again, with its own `requires_grad`, and is in its own mode.

Limits: float32 and float64 weights only. Half precision swallows steps of the size of a learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffedit.errors import RequestError, UnsupportedTensorError
from diffedit.interfaces import Backend
from diffedit.site import EditSite

_TRAINABLE = (torch.float32, torch.float64)


class Scratch:
    """Copies of the weights of some sites, to be trained; made by `scratch`.

    Args:
        weights: the live weight of each site.
        components: the modules that hold them.
    """

    def __init__(self, weights: Mapping[EditSite, Tensor], components: Sequence[nn.Module]) -> None:
        self._live = dict(weights)
        self._copies = {site: nn.Parameter(weight.detach().clone()) for site, weight in weights.items()}
        self._slots = [
            (module, key, self._live[site], self._copies[site])
            for component in components
            for module in component.modules()
            for key, parameter in module.named_parameters(recurse=False)
            for site, weight in weights.items()
            if parameter is weight
        ]
        missing = set(weights) - {site for site in weights if any(live is weights[site] for *_, live, _ in self._slots)}
        if missing:
            raise UnsupportedTensorError(
                "a weight is not a parameter of its component", value=", ".join(sorted(site.name for site in missing))
            )

    @property
    def sites(self) -> tuple[EditSite, ...]:
        """What is trained, sorted."""
        return tuple(sorted(self._copies))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The copies, in the order of `sites`."""
        return [self._copies[site] for site in self.sites]

    @contextmanager
    def trained(self) -> Iterator[None]:
        """The copies in place of the weights, inside the block."""
        try:
            for module, key, _, copy in self._slots:
                setattr(module, key, copy)
            yield
        finally:
            self.put_back()

    def put_back(self) -> None:
        """The live parameters in their places; harmless when they are there already."""
        for module, key, live, _ in self._slots:
            setattr(module, key, live)

    def changes(self) -> dict[EditSite, Tensor]:
        """What training made of each weight, minus the weight: [d_out, d_in], float64."""
        return {site: self._copies[site].detach().double() - self._live[site].detach().double() for site in self.sites}

    def set_changes(self, changes: Mapping[EditSite, Tensor]) -> None:
        """Let the copies be the live weights plus these changes (a site that is left out gets none)."""
        with torch.no_grad():
            for site, copy in self._copies.items():
                exact = self._live[site].detach().double()
                copy.copy_(exact + changes[site] if site in changes else exact)


@contextmanager
def scratch(backend: Backend, sites: Sequence[EditSite], components: Sequence[str]) -> Iterator[Scratch]:
    """A place to train in; see the module's text.

    Args:
        backend: the model.
        sites: whose weights to train.
        components: pipeline components that will run inside, those of the sites among them.

    Raises:
        UnsupportedTensorError: a weight is in half precision, or cannot be edited at all.
        RequestError: no sites.
    """
    if not sites:
        raise RequestError("there is nothing to train", value="no edit sites", hint="choose another locator")
    weights = {site: backend.weight(site) for site in sites}
    for site, weight in weights.items():
        if weight.dtype not in _TRAINABLE:
            raise UnsupportedTensorError(
                f"{site.name} cannot be fine-tuned in {weight.dtype}",
                cause="half precision swallows small steps",
                hint="load the model in float32",
            )
    modules: list[nn.Module] = [getattr(backend.model.pipeline, name) for name in components]
    modes = [(child, child.training) for module in modules for child in module.modules()]
    flags = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    room: Scratch | None = None
    try:
        with ExitStack() as scopes:
            for scope in _gradients_on(modules):
                scopes.enter_context(scope)
            for module in modules:
                module.eval()
                module.requires_grad_(False)
            room = Scratch(weights, modules)
            yield room
    finally:
        if room is not None:
            room.put_back()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for child, mode in modes:
            child.training = mode


def _gradients_on(modules: Sequence[nn.Module]) -> list[Any]:
    """Gradients whatever the caller's mode, and no autocast, which would round what is trained."""
    devices = {parameter.device.type for module in modules for parameter in module.parameters()}
    casts = [torch.autocast(device_type=device, enabled=False) for device in sorted(devices)]
    return [torch.inference_mode(False), torch.enable_grad(), *casts]
