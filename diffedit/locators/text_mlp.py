"""One MLP of the text encoder, where ROME-like methods put a fact.

Source: Arad et al. 2024 (ReFACT, arXiv 2306.00738) edit the second layer of an MLP, layer 7 of 12 for facts (layer 9
    for the assumptions of the TIME benchmark). This locator counts in shares of the depth, so that it means the same in
    encoders of other depths, and measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from diffedit.errors import UnsupportedModelError
from diffedit.interfaces import Backend, Locator
from diffedit.request import Request
from diffedit.site import Location, Role, TokenRule


class TextMLPLocator(Locator):
    """The second layer of one MLP.

    Attributes:
        depth: share of the way from the first layer (0) to the last (1); 0.64 is layer 7 of 12.
        layer: that layer instead, from 0.
        tokens: positions to pair.
    """

    name = "text-mlp"
    reference = "Arad et al. 2024, arXiv 2306.00738"

    depth: float = Field(default=0.64, ge=0, le=1)
    layer: int | None = Field(default=None, ge=0)
    tokens: TokenRule = TokenRule.LAST_SUBJECT

    def locate(self, backend: Backend, requests: Sequence[Request]) -> Location:
        """The configured layer, if the model has it; in a model with two text encoders that of the first.

        Raises:
            UnsupportedModelError: the model has no such layer.
        """
        known = backend.sites(Role.TEXT_MLP_OUT)
        first = [site for site in known if site.component == min(other.component for other in known)]
        layer = round(self.depth * (len(first) - 1)) if self.layer is None else self.layer
        sites = tuple(site for site in first if site.layer == layer)
        if not sites:
            raise UnsupportedModelError(
                f"the model has no MLP at layer {layer}",
                value=f"backend {backend.name}",
                hint=f"choose a layer from 0 to {len(first) - 1}" if first else "choose another updater",
            )
        return Location(sites, self.tokens, self.name, self.reference)
