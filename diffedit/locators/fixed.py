"""The site that the paper's causal tracing found for every attribute: layer 0 self-attention, last subject token.

Source: Basu et al. 2023 (arXiv 2310.13730): in Stable Diffusion's CLIP text encoder one state is causal, the output
    of the first self-attention layer at the last token of the subject. This locator takes their word for it and
    measures nothing. For Stable Diffusion XL nobody has measured it: that both its encoders have the same state is
    taken over from the one that was looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from diffedit.errors import UnsupportedModelError
from diffedit.interfaces import Backend, Locator
from diffedit.request import Request
from diffedit.site import Location, Role, TokenRule


class FixedLocator(Locator):
    """Always the same site; in a model with two text encoders the one of each.

    Attributes:
        layer: block of the text encoder, from 0. Later blocks see the concept already mixed into other tokens;
            edits there do little (published) or much harm.
        role: the layer's part to edit.
        tokens: positions to pair; all subject tokens also reach names whose first word carries them.
    """

    name = "fixed"
    reference = "Basu et al. 2023, arXiv 2310.13730, the single causal state of the CLIP text encoder"

    layer: int = Field(default=0, ge=0)
    role: Role = Role.TEXT_SELF_ATTN_OUT
    tokens: TokenRule = TokenRule.LAST_SUBJECT

    def locate(self, backend: Backend, requests: Sequence[Request]) -> Location:
        """The configured site, if the model has it."""
        known = backend.sites(self.role)
        sites = tuple(site for site in known if site.layer == self.layer)
        if not sites:
            raise UnsupportedModelError(
                f"the model has no {self.role} at layer {self.layer}",
                value=f"backend {backend.name}",
                hint=f"choose a layer from 0 to {max(site.layer for site in known)}"
                if known
                else "choose another role",
            )
        return Location(sites, self.tokens, self.name, self.reference)
