"""Edit sites of some roles in a range of layers: what the locators that measure nothing have in common."""

from __future__ import annotations

from collections.abc import Sequence

from diffedit.errors import UnsupportedModelError
from diffedit.interfaces import Backend
from diffedit.site import EditSite, Role


def sites_between(
    backend: Backend, roles: Sequence[Role], first: int, last: int | None, *, what: str, unit: str, otherwise: str
) -> tuple[EditSite, ...]:
    """The sites in layers `first` to `last` (`None`: to the end), sorted.

    Args:
        backend: the model.
        roles: of the sites.
        first: first layer, from 0.
        last: last layer.
        what: what the sites are, for the error.
        unit: what a layer is called, in the plural.
        otherwise: what to do if the model has none at all.

    Raises:
        UnsupportedModelError: there are none.
    """
    known = backend.sites(*roles)
    end = max((site.layer for site in known), default=-1)
    stop = end if last is None else last
    sites = tuple(sorted(site for site in known if first <= site.layer <= stop))
    if not sites:
        raise UnsupportedModelError(
            f"the model has no such {what}",
            value=f"backend {backend.name}, {unit} {first} to {stop}",
            hint=f"choose {unit} from 0 to {end}" if known else otherwise,
        )
    return sites
