"""All layers through which the picture reads the text: the keys and values of the UNet's cross-attention.

Source: Orgad et al. 2023 (TIME, arXiv 2303.08084) and Gandikota et al. 2024 (UCE, arXiv 2308.14761) edit them all.
    This locator measures nothing; `locogen` measures which few of them suffice. Blocks are counted in the order in
    which the UNet runs them, not by the letters of their names.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from diffedit.errors import RequestError
from diffedit.interfaces import Backend, Locator
from diffedit.locators.ranges import sites_between
from diffedit.request import Request
from diffedit.site import Location, Role, TokenRule


class CrossAttentionLocator(Locator):
    """The key and value projections of a range of cross-attention blocks, by default of all.

    Attributes:
        keys: edit the key projections, which decide where in the picture a word is looked at.
        values: edit the value projections, which decide what is seen there.
        first: first block, from 0.
        last: last block; default: to the end.
        tokens: positions to pair.
    """

    name = "cross-attention"
    reference = "Orgad et al. 2023, arXiv 2303.08084, and Gandikota et al. 2024, arXiv 2308.14761"

    keys: bool = True
    values: bool = True
    first: int = Field(default=0, ge=0)
    last: int | None = Field(default=None, ge=0)
    tokens: TokenRule = TokenRule.LAST_SUBJECT

    def locate(self, backend: Backend, requests: Sequence[Request]) -> Location:
        """The configured sites, if the model has them.

        Raises:
            RequestError: neither keys nor values are wanted.
            UnsupportedModelError: the model has no such layers.
        """
        chosen = ((self.keys, Role.UNET_CROSS_ATTN_K), (self.values, Role.UNET_CROSS_ATTN_V))
        roles = [role for wanted, role in chosen if wanted]
        if not roles:
            raise RequestError("neither keys nor values are to be edited", hint="leave one of them on")
        otherwise = "choose an updater of the text encoder"
        said = {"what": "cross-attention layers", "unit": "blocks", "otherwise": otherwise}
        sites = sites_between(backend, roles, self.first, self.last, **said)
        return Location(sites, self.tokens, self.name, self.reference)
