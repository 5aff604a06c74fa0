"""The MLPs of a range of the text encoder's layers, over which MEMIT-like methods spread an edit.

Source: Xiong et al. 2024 (EMCID, arXiv 2403.13807) edit layers 0 to 10 of 12, and in a smaller variant 7 to 10. The
    range ends before the last layer: what is written at the subject in the last one reaches no later token. This
    locator counts in shares of the depth, so that it means the same in encoders of other depths, and measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from diffedit.interfaces import Backend, Locator
from diffedit.locators.ranges import sites_between
from diffedit.request import Request
from diffedit.site import Location, Role, TokenRule


class TextMLPRangeLocator(Locator):
    """The second layers of the MLPs of a range of layers, by default of all but the last.

    Attributes:
        start: share of the way from the first layer (0) to the last (1) at which the range starts; 0.64 is layer 7 of
            12.
        stop: share at which it ends, rounded down; 0.91 is layer 10 of 12.
        first: that layer instead, from 0.
        last: that layer instead.
        tokens: positions to pair.
    """

    name = "text-mlp-range"
    reference = "Xiong et al. 2024, arXiv 2403.13807"

    start: float = Field(default=0.0, ge=0, le=1)
    stop: float = Field(default=0.91, ge=0, le=1)
    first: int | None = Field(default=None, ge=0)
    last: int | None = Field(default=None, ge=0)
    tokens: TokenRule = TokenRule.LAST_SUBJECT

    def locate(self, backend: Backend, requests: Sequence[Request]) -> Location:
        """The configured layers, if the model has them; in a model with two text encoders those of both.

        Raises:
            UnsupportedModelError: the model has no such layers.
        """
        end = max((site.layer for site in backend.sites(Role.TEXT_MLP_OUT)), default=0)
        first = round(self.start * end) if self.first is None else self.first
        last = int(self.stop * end) if self.last is None else self.last
        said = {"what": "MLPs of the text encoder", "unit": "layers", "otherwise": "choose another updater"}
        sites = sites_between(backend, [Role.TEXT_MLP_OUT], min(first, last), last, **said)
        return Location(sites, self.tokens, self.name, self.reference)
