"""A range of the text encoder's layers: attention outputs, MLP outputs, or both.

For updaters that train, and have no single causal site to rely on. It measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from diffedit.errors import RequestError
from diffedit.interfaces import Backend, Locator
from diffedit.locators.ranges import sites_between
from diffedit.request import Request
from diffedit.site import Location, Role, TokenRule


class TextLayersLocator(Locator):
    """The output projections of a range of text encoder layers, by default of all.

    Attributes:
        attention: edit the output projection of self-attention.
        mlp: edit the MLP's second layer.
        first: first layer, from 0.
        last: last layer; default: to the end.
        tokens: positions to pair, for updaters that pair any.
    """

    name = "text-layers"
    reference = "a choice, not a measurement: whole layers of the text encoder"

    attention: bool = True
    mlp: bool = True
    first: int = Field(default=0, ge=0)
    last: int | None = Field(default=None, ge=0)
    tokens: TokenRule = TokenRule.LAST_SUBJECT

    def locate(self, backend: Backend, requests: Sequence[Request]) -> Location:
        """The configured sites, if the model has them.

        Raises:
            RequestError: neither attention nor MLP is wanted.
            UnsupportedModelError: the model has no such layers.
        """
        chosen = ((self.attention, Role.TEXT_SELF_ATTN_OUT), (self.mlp, Role.TEXT_MLP_OUT))
        roles = [role for wanted, role in chosen if wanted]
        if not roles:
            raise RequestError("neither attention nor MLP is to be edited", hint="leave one of them on")
        said = {"what": "text encoder layers", "unit": "layers", "otherwise": "choose another updater"}
        sites = sites_between(backend, roles, self.first, self.last, **said)
        return Location(sites, self.tokens, self.name, self.reference)
