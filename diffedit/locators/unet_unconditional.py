"""The UNet's linear layers outside of cross-attention: where ESD-u unlearns.

Source: Gandikota et al. 2023 (ESD, arXiv 2303.07345) recommend them for objects and for concepts that no word names,
    because what they learn holds whatever the prompt says. This locator measures nothing.
Differs: the paper trains convolutions too, which are no edit sites.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from diffedit.errors import RequestError
from diffedit.interfaces import Backend, Locator
from diffedit.locators.ranges import sites_between
from diffedit.request import Request
from diffedit.site import Location, Role, TokenRule


class UNetUnconditionalLocator(Locator):
    """Linear layers of the UNet that see no text, by default all.

    Attributes:
        self_attention: edit the four projections of self-attention.
        feed_forward: edit both layers of the feed-forward nets.
        time: edit what residual blocks make of the time step.
        projections: edit the projections around the transformer blocks, where the model has linear ones.
        tokens: positions to pair, for updaters that pair any.
    """

    name = "unet-unconditional"
    reference = "Gandikota et al. 2023, arXiv 2303.07345, ESD-u without convolutions"

    self_attention: bool = Field(default=True)
    feed_forward: bool = Field(default=True)
    time: bool = Field(default=True)
    projections: bool = Field(default=True)
    tokens: TokenRule = TokenRule.LAST_SUBJECT

    def locate(self, backend: Backend, requests: Sequence[Request]) -> Location:
        """The configured sites, if the model has them.

        Raises:
            RequestError: no kind of layer is wanted.
            UnsupportedModelError: the model has none of them.
        """
        chosen = (
            (self.self_attention, Role.UNET_SELF_ATTN),
            (self.feed_forward, Role.UNET_FEED_FORWARD),
            (self.time, Role.UNET_TIME),
            (self.projections, Role.UNET_PROJECTION),
        )
        roles = [role for wanted, role in chosen if wanted]
        if not roles:
            raise RequestError("no kind of layer is to be edited", hint="leave one of them on")
        said = {"what": "linear layers in the UNet", "unit": "blocks", "otherwise": "choose another updater"}
        sites = sites_between(backend, roles, 0, None, **said)
        return Location(sites, self.tokens, self.name, self.reference)
