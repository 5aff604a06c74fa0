"""Stable Diffusion XL: two CLIP text encoders that read each prompt side by side.

    text_encoder     OpenAI's CLIP-L, 12 layers x 768, quick_gelu, padded with the end-of-text token
    text_encoder_2   OpenCLIP's ViT-bigG, 32 layers x 1280, gelu, padded with "!" (id 0), with a text projection

The UNet's cross-attention reads, for every position, h = [h1, h2] with h_i [t, d_i] = `hidden_states[-2]` of encoder i,
that is the input of its last block: the last block and the final layer norm are left out. Beside that the UNet takes
one vector per prompt: the second encoder's end-of-text state after *all* its blocks, projected.

So an edit in the last block of `text_encoder` does nothing at all, and one in that of `text_encoder_2` reaches the
pooled vector only, at a position that no subject token is. Neither last block is an edit site here. An edit that leaves
one encoder alone leaves the concept in half of h; the locator `fixed` therefore takes layer 0 of both.

Token positions have to mean the same in both encoders, since the UNet puts the two states of a position into one
vector. The published tokenizers differ in the padding token alone, which is enough to give "!" in a prompt another id,
and "!!" another number of tokens. So every encoder reads the ids of its own tokenizer, and where the two put a subject
at different positions, that is an error.

Source: Podell et al. 2023 (arXiv 2307.01952); what is concatenated and what is pooled follows diffusers'
`StableDiffusionXLPipeline.encode_prompt`. Limits: no causal tracing; the refiner, which has the second encoder only, is
not accepted; the measurement that layer 0 is causal was made on Stable Diffusion 1.x, not on this family.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffedit.backends.checkpoint import save_checkpoint
from diffedit.backends.hooks import Record, evaluating
from diffedit.backends.precision import widened
from diffedit.backends.saving import save_pipeline
from diffedit.backends.stable_diffusion import StableDiffusion
from diffedit.backends.unet import UNET, cross_attention_sites, record_cross_attention
from diffedit.errors import UnsupportedModelError
from diffedit.interfaces import Activations, Backend, LoadedModel
from diffedit.reading import LazyRows, Place, Rows, Taker
from diffedit.site import EditSite, Role, SubjectSpan

if TYPE_CHECKING:
    from PIL.Image import Image

_TEXT_ROLES = (Role.TEXT_SELF_ATTN_OUT, Role.TEXT_MLP_OUT)
_CUTTING = ("model", "normalizer", "pre_tokenizer", "post_processor")  # of a tokenizer's JSON: what decides on the ids


class _First(StableDiffusion):
    """One text encoder with its tokenizer, seen as the only one: what `StableDiffusion` does holds for each."""

    name = "sdxl"
    reference = "Podell et al. 2023, arXiv 2307.01952"
    component = "text_encoder"


class _Second(_First):
    component = "text_encoder_2"


class SDXL(Backend):
    """Stable Diffusion XL, both text encoders."""

    name = "sdxl"
    reference = "Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952), CLIP-L and OpenCLIP bigG text encoders"

    def __init__(self, model: LoadedModel) -> None:
        super().__init__(model)
        self._first, self._second = _First(model), _Second(model)
        self._encoders: dict[str, StableDiffusion] = {half.component: half for half in (self._first, self._second)}

    @classmethod
    def accepts(cls, pipeline: Any) -> bool:
        """A pipeline with two CLIP text encoders, the second with a projection, and a tokenizer for each."""
        for component in (_First.component, _Second.component):
            encoder = getattr(pipeline, component, None)
            clip = getattr(getattr(encoder, "config", None), "model_type", "").startswith("clip")
            if not clip or not hasattr(getattr(encoder, "text_model", encoder), "encoder"):
                return False
        tokenizers = all(getattr(pipeline, name, None) is not None for name in ("tokenizer", "tokenizer_2"))
        third = getattr(pipeline, "text_encoder_3", None)
        return tokenizers and third is None and hasattr(pipeline.text_encoder_2, "text_projection")

    @cached_property
    def _text_sites(self) -> tuple[EditSite, ...]:
        return tuple(site for half in self._encoders.values() for site in half.sites(*_TEXT_ROLES) if self._read(site))

    def _read(self, site: EditSite) -> bool:
        """Whether cross-attention reads anything that the site has a part in: all blocks but the last."""
        pipeline = self.model.pipeline
        return site.layer < int(getattr(pipeline, site.component).config.num_hidden_layers) - 1

    def sites(self, *roles: Role) -> tuple[EditSite, ...]:
        """Those of `text_encoder`, then those of `text_encoder_2`, each without its last block; see the module's text.

        Key and value projections of the UNet's cross-attention follow where their roles are named.
        """
        wanted = roles or _TEXT_ROLES
        unet = getattr(self.model.pipeline, UNET, None) if set(wanted) - set(_TEXT_ROLES) else None
        return tuple(site for site in (*self._text_sites, *cross_attention_sites(unet)) if site.role in wanted)

    def span(self, prompt: str, subject: str, occurrence: int | None = None) -> SubjectSpan:
        """Token positions of the subject, which are the same in both encoders; see `Backend.span`.

        Raises:
            UnsupportedModelError: the two tokenizers cut this prompt differently.
        """
        span = self._first.span(prompt, subject, occurrence)
        return span if self._alike(prompt) else _same(span, self._second.span(prompt, subject, occurrence))

    def spans(self, phrases: Sequence[tuple[str, str, int]]) -> list[SubjectSpan]:
        """`span` for many; see `Backend.spans`."""
        found = self._first.spans(phrases)
        odd = [i for i, (prompt, _, _) in enumerate(phrases) if not self._alike(prompt)]
        for i, other in zip(odd, self._second.spans([phrases[i] for i in odd]), strict=True):
            _same(found[i], other)
        return found

    def _alike(self, prompt: str) -> bool:
        """Whether both tokenizers give the prompt the same ids, padding aside; on the safe side."""
        return self._apart is not None and not any(text in prompt.lower() for text in self._apart)

    @cached_property
    def _apart(self) -> frozenset[str] | None:
        """Texts that are a token by decree in one tokenizer only; `None` if the two differ in more than that."""
        cut, decreed = [], []
        for half in self._encoders.values():
            backend = getattr(half._tokenizer, "backend_tokenizer", None)
            whole: Mapping[str, Any] = {} if backend is None else json.loads(backend.to_str())
            cut.append((half.length, {key: whole.get(key) for key in _CUTTING}))
            decreed.append({json.dumps(token, sort_keys=True) for token in whole.get("added_tokens", ())})
        if cut[0] != cut[1] or not cut[0][1]["model"]:
            return None
        return frozenset(json.loads(token)["content"].lower() for token in decreed[0] ^ decreed[1])

    def capture(self, prompts: Sequence[str], sites: Sequence[EditSite], *, padded: bool = False) -> Activations:
        """Run the prompts through each encoder that has a site among these, up to its deepest one.

        `tokens` are those of the first of these encoders. For sites of the UNet both encoders run; see `backends.unet`.
        """
        seen = Record()
        tokens: Tensor | None = None
        for component, half in self._encoders.items():
            own = [self._known(site) for site in sites if site.component == component]
            if own:
                part = half.capture(prompts, own, padded=padded)
                tokens = part.tokens if tokens is None else tokens
                seen.inputs.update(part.inputs)
                seen.outputs.update(part.outputs)
                seen.streams.update(part.streams)
        cross = [site for site in sites if site.component not in self._encoders]
        if cross:
            record_cross_attention(self.model.pipeline.unet, cross, self.hidden(prompts, padded=padded), seen)
        return Activations(
            self._first.tokenize(prompts, padded=padded) if tokens is None else tokens,
            {site: seen.inputs[site] for site in sites},
            {site: seen.outputs[site] for site in sites},
            {site: seen.streams[site] for site in sites},
        )

    def read(self, places: Sequence[Place], sites: Sequence[EditSite], *, padded: bool = False) -> Rows:
        """What the sites see at single tokens, each encoder by the ids of its own tokenizer; see `Backend.read`."""
        takers: dict[EditSite, Taker] = {}
        for component, half in self._encoders.items():
            own = [self._known(site) for site in sites if site.component == component]
            if own:
                given = places if half is self._first else [(self._in_second(span), at) for span, at in places]
                part = half.read(given, own, padded=padded)
                takers.update((site, partial(part.take, site)) for site in own)
        cross = [site for site in sites if site.component not in self._encoders]
        if cross:
            part = super().read(places, cross, padded=padded)
            takers.update((site, partial(part.take, site)) for site in cross)
        return LazyRows(len(places), takers)

    def independent(self, sites: Sequence[EditSite], *, padded: bool = False) -> bool:
        """Where it holds for each encoder by itself; see `Backend.independent`."""
        own = [[site for site in sites if site.component == component] for component in self._encoders]
        halves = zip(self._encoders.values(), own, strict=True)
        return sum(map(len, own)) == len(sites) and all(
            half.independent(mine, padded=padded) for half, mine in halves if mine
        )

    def positions(self, prompt: str, site: EditSite) -> int:
        """How many positions the encoders read, whatever the prompt and the site; the same number in both."""
        return self._first.length

    def _in_second(self, span: SubjectSpan) -> SubjectSpan:
        """The span with the second tokenizer's ids."""
        if self._alike(span.prompt):
            return span
        ids = self._second._tokenizer(span.prompt, truncation=True, max_length=self._second.length)["input_ids"]
        return replace(span, tokens=tuple(ids))

    def hidden(self, prompts: Sequence[str], *, padded: bool = True) -> Tensor:
        """[b, t, d_1 + d_2], what cross-attention reads: `hidden_states[-2]` of both encoders side by side."""
        parts = []
        for half in self._encoders.values():
            with evaluating(half._encoder), widened(half._encoder):
                ids = half.tokenize(prompts, padded=padded)
                parts.append(half._encoder(input_ids=ids, output_hidden_states=True).hidden_states[-2].detach())
        device = parts[0].device
        return torch.cat([part.to(device) for part in parts], -1)

    def features(self, prompts: Sequence[str]) -> Tensor:
        """The pooled, projected vector of the second encoder: the one vector per prompt that the UNet takes."""
        encoder = self.model.pipeline.text_encoder_2
        with evaluating(encoder):
            out = encoder(input_ids=self._second.tokenize(prompts, padded=False))
        pooled: Tensor = out.text_embeds
        return pooled.detach().float()

    def weight(self, site: EditSite) -> Tensor:
        """The live weight of the site's linear layer; see `Backend.weight`."""
        return self._owner(site).weight(site)

    def bias(self, site: EditSite) -> Tensor | None:
        """The bias of the site's linear layer."""
        return self._owner(site).bias(site)

    def fingerprints(self) -> dict[str, str]:
        """Hashes of both encoders' architectures and of both tokenizers' vocabularies and padding tokens."""
        halves = {component: half.fingerprints() for component, half in self._encoders.items()}
        found = {}
        for part in ("architecture", "tokenizer"):
            text = json.dumps({component: digests[part] for component, digests in halves.items()}, sort_keys=True)
            found[part] = hashlib.sha256(text.encode()).hexdigest()
        return found

    def generate(
        self, pairs: Sequence[tuple[str, int]], *, steps: int, guidance: float, batch_size: int
    ) -> list[Image]:
        """Sample with the pipeline's own scheduler, as for the other families; both encoders get the same prompt."""
        return self._first.generate(pairs, steps=steps, guidance=guidance, batch_size=batch_size)

    def save(self, path: Path, *, overwrite: bool = False) -> Path:
        """The merged pipeline as a folder, or as a new single file if it came from one and `path` names one."""
        if path.suffix.lower() != ".safetensors":
            return save_pipeline(self.model.pipeline, path, overwrite=overwrite, variant=self.model.variant)
        if self.model.file is None:
            hint = "name a folder, or load the model from a .safetensors checkpoint"
            raise UnsupportedModelError("only a single-file model can be saved as one file", value=path.name, hint=hint)
        save_checkpoint(self, self.model.file, path)
        return path

    def _owner(self, site: EditSite) -> StableDiffusion:
        self._known(site)
        return self._encoders.get(site.component, self._first)  # the UNet is the same seen from either

    def _known(self, site: EditSite) -> EditSite:
        """The site, unless it is in a last block."""
        if site.component in self._encoders and not self._read(site):
            raise UnsupportedModelError(
                "Stable Diffusion XL does not read the last block of a text encoder",
                value=site.name,
                cause="its cross-attention takes the block's input, so a change of the block would do nothing there",
                hint="choose an earlier layer",
            )
        return site


def _same(span: SubjectSpan, other: SubjectSpan) -> SubjectSpan:
    """The span, if the second tokenizer sees it at the same positions."""
    if span != other:
        raise UnsupportedModelError(
            f"the two tokenizers of the model put {span.subject!r} at different positions",
            value=f"{span.start} to {span.last} and {other.start} to {other.last} in {span.prompt!r}",
            cause="their vocabularies, or their special tokens, cut the prompt differently",
            hint="leave punctuation out of the prompt, or load the model with its own two tokenizers",
        )
    return span
