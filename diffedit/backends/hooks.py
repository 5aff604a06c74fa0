"""Reading what flows through chosen modules: forward hooks as context managers that leave nothing behind.

`record` notes the input and output of each linear layer and the residual stream of its block, and ends the forward
pass at the deepest of them: for layer 0 of a 12-layer encoder that saves eleven layers and more. Hooks of other
owners are never touched, and ours are removed on success, on error and on Ctrl-C alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffedit.site import EditSite


@dataclass
class Record:
    """What was seen, filled while the block of `record` runs. Tensors are detached."""

    inputs: dict[EditSite, Tensor] = field(default_factory=dict)
    outputs: dict[EditSite, Tensor] = field(default_factory=dict)
    streams: dict[EditSite, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Tap:
    """The two modules to listen to for one site.

    Attributes:
        layer: the linear layer itself.
        norm: the layer norm whose input is the residual stream that the layer's output is added to.
    """

    layer: nn.Module
    norm: nn.Module


class _Stop(Exception):
    """Ends a forward pass once everything that was asked for has been seen."""


@contextmanager
def record(taps: Mapping[EditSite, Tap]) -> Iterator[Record]:
    """Record the forward pass that the caller runs inside the block; it stops at the last site.

    Yields:
        The record; complete when the block is left without an error.
    """
    seen = Record()
    handles = []

    def keep_stream(site: EditSite) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else kwargs["hidden_states"]
            seen.streams[site] = value.detach()

        return hook

    def keep_both(site: EditSite) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen.inputs[site] = args[0].detach()
            seen.outputs[site] = output.detach()
            if len(seen.outputs) == len(taps):
                raise _Stop

        return hook

    try:
        for site, tap in taps.items():
            handles.append(tap.norm.register_forward_pre_hook(keep_stream(site), with_kwargs=True))
            handles.append(tap.layer.register_forward_hook(keep_both(site)))
        with suppress(_Stop):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside the block; each submodule's own mode comes back afterwards."""
    training = [child for child in module.modules() if child.training]
    try:
        if training:  # setting the mode of a hundred modules takes longer than running the first layer
            module.eval()
        with torch.no_grad(), torch.autocast(device_type=_device(module).type, enabled=False):
            yield
    finally:
        for child in training:
            child.training = True


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
