"""What a causal trace may do to a running model: the parts it can restore, and the runs that it compares.

A trace compares three kinds of run of one prompt (Basu et al. 2023, arXiv 2310.13730, after Meng et al. 2022, arXiv
2202.05262). The *clean* run is untouched. In the *corrupted* run Gaussian noise is added to the word embeddings of the
subject. A *restored* run is a corrupted one in which the output of some parts, at some token positions, is copied from
the clean run. Everything here is data; only backends act on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from diffedit.site import EditSite

if TYPE_CHECKING:
    from torch import Tensor

TEXT_ENCODER = "text_encoder"
UNET = "unet"

EMBEDDING = "embedding"
SELF_ATTN = "self_attn"
MLP = "mlp"
CROSS_ATTN = "cross_attn"
FEED_FORWARD = "feed_forward"
RESNET = "resnet"


@dataclass(frozen=True, order=True)
class Part:
    """One module of a model whose output a run may take from another run.

    Attributes:
        component: pipeline component, in diffusers' words.
        order: position in the order in which the component runs its parts, from 0.
        kind: what it is: `embedding`, `self_attn` and `mlp` in a text encoder; `self_attn`, `cross_attn`,
            `feed_forward` and `resnet` in a UNet.
        layer: index among the parts of its kind, in the order in which they run, from 0.
        path: canonical module path inside the component.
        sites: the edit sites inside it.
    """

    component: str
    order: int
    kind: str
    layer: int
    path: str
    sites: tuple[EditSite, ...] = ()

    @property
    def name(self) -> str:
        """Kind and index, as the papers write it: `self_attn-0`."""
        return f"{self.kind}-{self.layer}"


@dataclass(frozen=True)
class Patch:
    """States of the text encoder that a restored run takes from the clean run.

    Attributes:
        parts: parts of the text encoder; none leaves the run corrupted.
        positions: token positions, counted with the begin-of-text token at 0.
    """

    parts: tuple[Part, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TextRuns:
    """What the text encoder made of a prompt in each run.

    Attributes:
        tokens: [t], token ids, padded as the pipeline does.
        states: [2 + p, t, d], the embedding that conditions the image model: clean, corrupted, then one per patch.
        pooled: [2 + p, d], the same at the end-of-text token.
    """

    tokens: Tensor
    states: Tensor
    pooled: Tensor


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of the image model that a measure compares. Run 0 is the reference, run 1 the one without the effect.

    In a causal trace run 0 is clean, run 1 corrupted and the others restored; for `LocoGen` run 0 is the target
    prompt's, run 1 the original prompt's, and the others read the target's embedding in a few layers.

    Attributes:
        caption: what run 0 should show.
        seed: of the starting latents, the same in every run.
        embeddings: [n, t, d], what conditions each run.
        parts: per run, the UNet parts that take something from run 0; empty for a run of its own.
        take: what they take: their `output`, or what they read (the `embedding`, cross-attention only).
        both_branches: with `output`, whether the unconditional branch of classifier-free guidance is restored too.
    """

    caption: str
    seed: int
    embeddings: Tensor
    parts: tuple[tuple[Part, ...], ...]
    take: Literal["output", "embedding"] = "output"
    both_branches: bool = False

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def patched(self) -> bool:
        """Whether any run takes anything from run 0."""
        return any(self.parts)


def find_parts(parts: Sequence[Part], kinds: Sequence[str]) -> tuple[Part, ...]:
    """The parts of some kinds, in running order."""
    return tuple(sorted((part for part in parts if part.kind in kinds), key=lambda part: part.order))
