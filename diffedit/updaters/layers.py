"""The live layers behind edit sites: which module one is, in which order they run, and running with edits not written.

Sites of one text encoder feed each other: once an earlier one is edited, a later one reads something else. Updaters
that edit several therefore take them in turn, and read each under the edits so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from diffedit.delta import LowRank
from diffedit.errors import UnsupportedModelError
from diffedit.interfaces import Backend
from diffedit.site import EditSite, Role

_SECOND = (Role.TEXT_MLP_OUT,)  # runs after the attention of the same layer


def layer_of(backend: Backend, site: EditSite) -> nn.Module:
    """The one module of the site's component that holds its weight.

    Raises:
        UnsupportedModelError: there is none, or several.
    """
    component: Any = getattr(backend.model.pipeline, site.component, None)
    weight = backend.weight(site)
    owners: list[nn.Module] = (
        [m for m in component.modules() if getattr(m, "weight", None) is weight] if component else []
    )
    if len(owners) != 1:
        cause = "no single module of the pipeline holds its weight"
        raise UnsupportedModelError("the layer cannot be steered", value=site.name, cause=cause)
    return owners[0]


def in_turn(sites: Sequence[EditSite]) -> list[dict[EditSite, float]]:
    """The sites in the order in which they run, those of several text encoders side by side.

    Returns:
        One entry per turn: its sites, each with the share that it takes of what is still missing, so that all sites of
        an encoder carry equal parts (MEMIT, Meng et al. 2023, arXiv 2210.07229, eq. 20).
    """
    by: dict[str, list[EditSite]] = {}
    for site in sorted(sites, key=lambda site: (site.component, site.layer, site.role in _SECOND, site.path)):
        by.setdefault(site.component, []).append(site)
    turns = max(map(len, by.values()), default=0)
    return [{mine[turn]: 1.0 / (len(mine) - turn) for mine in by.values() if turn < len(mine)} for turn in range(turns)]


@contextmanager
def edited(backend: Backend, changes: Mapping[EditSite, LowRank]) -> Iterator[None]:
    """The model as if these changes were in its weights, inside the block; nothing is written."""
    handles = []
    try:
        for site, change in changes.items():
            handles.append(layer_of(backend, site).register_forward_hook(_adding(change)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(change: LowRank) -> Any:
    up, down = change.up.double(), change.down.double()

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        left, right = down.T.to(output.device), up.T.to(output.device)
        return (output.double() + (args[0].double() @ left) @ right).to(output.dtype)

    return hook
