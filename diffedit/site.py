"""Where an edit may happen: components, linear layers and token positions, in names that outlive library versions.

A site's `path` is the *canonical* name: the nested one that Stable Diffusion's files use on disk
(`text_model.encoder.layers.0.self_attn.out_proj`), whatever layout the installed transformers gives the live modules;
in the UNet it is diffusers' own (`down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k`). Backends map it to a
module; nothing else resolves names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Role(StrEnum):
    """What a linear layer does in its block."""

    TEXT_SELF_ATTN_OUT = "text.self_attn.out_proj"
    TEXT_MLP_OUT = "text.mlp.fc2"
    UNET_CROSS_ATTN_K = "unet.cross_attn.to_k"
    UNET_CROSS_ATTN_V = "unet.cross_attn.to_v"
    UNET_SELF_ATTN = "unet.self_attn"
    UNET_FEED_FORWARD = "unet.ff"
    UNET_TIME = "unet.time_emb_proj"
    UNET_PROJECTION = "unet.proj"


class TokenRule(StrEnum):
    """Which token positions of a prompt carry the concept.

    `LAST_SUBJECT` is the paper's: the last token of the subject. `ALL_SUBJECT` takes each token of the subject,
    `EOS` the end-of-text token that follows the prompt.
    """

    LAST_SUBJECT = "last_subject"
    ALL_SUBJECT = "all_subject"
    EOS = "eos"


@dataclass(frozen=True, order=True)
class EditSite:
    """One linear layer `y = W x + b` whose weight `W` ([d_out, d_in]) may be edited; the bias never is.

    Attributes:
        component: pipeline component, in diffusers' words (`"text_encoder"`, `"unet"`).
        path: canonical module path inside the component, without `.weight`.
        layer: index of the block that holds the layer, counted from 0; in the UNet the blocks of each
            kind (cross-attention, self-attention, ...) are counted in the order in which the forward pass meets them.
        role: what the layer does.
        d_out: number of output features.
        d_in: number of input features.
    """

    component: str
    path: str
    layer: int
    role: Role
    d_out: int
    d_in: int

    @property
    def name(self) -> str:
        """`component.path`, unique in a pipeline."""
        return f"{self.component}.{self.path}"


@dataclass(frozen=True)
class SubjectSpan:
    """Token positions of a subject in one prompt, counted with the begin-of-text token at 0.

    Attributes:
        prompt: the prompt, NFC-normalised.
        subject: the text that was found.
        start: first token of the subject.
        stop: one past the last token of the subject (half-open).
        eos: position of the end-of-text token.
        tokens: ids from the begin-of-text token to the end-of-text token, if the backend says; no part of equality.
    """

    prompt: str
    subject: str
    start: int
    stop: int
    eos: int
    tokens: tuple[int, ...] = field(default=(), compare=False, repr=False)

    @property
    def last(self) -> int:
        """Position of the last subject token."""
        return self.stop - 1

    def positions(self, rule: TokenRule) -> tuple[int, ...]:
        """Token positions that `rule` selects, ascending."""
        if rule is TokenRule.LAST_SUBJECT:
            return (self.last,)
        if rule is TokenRule.ALL_SUBJECT:
            return tuple(range(self.start, self.stop))
        return (self.eos,)


@dataclass(frozen=True)
class Location:
    """What a locator found: the sites to edit, the tokens to pair there, and how it was found.

    Attributes:
        sites: sorted, never empty.
        tokens: which positions carry the concept at these sites.
        method: name of the locator.
        reference: the paper or reason behind it.
        scores: one number per site (for a causal trace its indirect effect), or empty when nothing was measured.
    """

    sites: tuple[EditSite, ...]
    tokens: TokenRule
    method: str
    reference: str
    scores: tuple[float, ...] = ()
