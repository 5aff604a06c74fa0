"""A backend over bare linear layers: all that the ledger needs of a model, and nothing that could hide a mistake."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffedit.delta import Delta, LowRank
from diffedit.interfaces import Backend, LoadedModel
from diffedit.site import EditSite, Role

SITES = tuple(
    EditSite("text_encoder", f"text_model.encoder.layers.{i}.self_attn.out_proj", i, Role.TEXT_SELF_ATTN_OUT, 6, 5)
    for i in range(2)
)


class Toy(Backend):
    """`nn.Linear` layers, one per site."""

    name = "toy"
    reference = "tests"

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(5, 6, dtype=dtype) for _ in SITES)
        for layer in self.layers:
            nn.init.normal_(layer.weight, generator=generator)
        super().__init__(LoadedModel(self.layers, "toy"))

    @classmethod
    def accepts(cls, pipeline):
        return isinstance(pipeline, nn.ModuleList)

    def weight(self, site: EditSite) -> Tensor:
        return self.layers[site.layer].weight

    def bits(self) -> tuple[bytes, ...]:
        """The raw bytes of every weight: equal means equal to the bit, NaN included."""
        return tuple(x.weight.detach().contiguous().view(torch.uint8).numpy().tobytes() for x in self.layers)


Toy.__abstractmethods__ = frozenset()  # the ledger asks for nothing else


def change(seed: int, scale: float = 1.0, *, sites=SITES, rank: int = 2) -> Delta:
    """A random change of some sites; `scale` 1 is as large as the toy's weights."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for site in sites:
        up, down = torch.randn(6, rank, generator=generator), torch.randn(rank, 5, generator=generator)
        factors[site] = LowRank(up * scale, down)
    return Delta(factors)
