"""Stable Diffusion 1.x and 2.x: the CLIP text encoder of a `StableDiffusionPipeline`, and its UNet's cross-attention.

SD 1.x reads OpenAI's CLIP-L (12 layers x 768, quick_gelu, padded with the end-of-text token), SD 2.x OpenCLIP's
ViT-H without its last layer (23 layers x 1024, gelu, padded with "!"). The activation tells them apart whatever the
size, so tiny models of either family work too.

Module names: transformers >= 5.6 flattened `CLIPTextModel` (modules start at `encoder.layers`); older releases, and
every file, nest it under `text_model`. Sites carry the nested name; `_root` bridges both, and a name that matches
nothing is an error, never a no-op.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from diffedit.backends.checkpoint import save_checkpoint
from diffedit.backends.hooks import Tap, evaluating, record
from diffedit.backends.interventions import Interventions
from diffedit.backends.precision import widened
from diffedit.backends.quiet import quiet
from diffedit.backends.saving import save_pipeline
from diffedit.backends.spans import subject_span
from diffedit.backends.token_reads import TokenReads
from diffedit.backends.unet import UNET, cross_attention_layer, cross_attention_sites, record_cross_attention
from diffedit.backends.unet_linear import LINEAR_ROLES, check_no_linear, linear_layer, linear_sites
from diffedit.errors import UnsupportedModelError, UnsupportedTensorError
from diffedit.interfaces import Activations
from diffedit.site import EditSite, Role, SubjectSpan

if TYPE_CHECKING:
    from PIL.Image import Image

_PREFIX = "text_model.encoder.layers"
_TEXT_ROLES = (Role.TEXT_SELF_ATTN_OUT, Role.TEXT_MLP_OUT)
_EDITABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class StableDiffusion(Interventions, TokenReads):
    """What both families share; see `SD1` and `SD2`."""

    activation: ClassVar[str]
    component: ClassVar[str] = "text_encoder"

    @classmethod
    def accepts(cls, pipeline: Any) -> bool:
        """A pipeline with one CLIP text encoder of this family's activation and a 2-D UNet."""
        encoder = getattr(pipeline, cls.component, None)
        config = getattr(encoder, "config", None)
        return (
            getattr(config, "model_type", "").startswith("clip")
            and getattr(config, "hidden_act", None) == cls.activation
            and getattr(pipeline, "text_encoder_2", None) is None
            and getattr(pipeline, "tokenizer", None) is not None
            and hasattr(cls._root(encoder), "encoder")
        )

    @staticmethod
    def _root(encoder: Any) -> Any:
        return getattr(encoder, "text_model", encoder)

    @property
    def _encoder(self) -> Any:
        return getattr(self.model.pipeline, self.component)

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.model.pipeline, self.component.replace("text_encoder", "tokenizer"))

    @cached_property
    def length(self) -> int:
        """Positions that the encoder reads, special tokens included (77 in Stable Diffusion)."""
        return int(min(self._tokenizer.model_max_length, self._encoder.config.max_position_embeddings))

    @cached_property
    def _sites(self) -> tuple[EditSite, ...]:
        config = self._encoder.config
        hidden, inner = config.hidden_size, config.intermediate_size
        found = []
        for i in range(config.num_hidden_layers):
            attn = f"{_PREFIX}.{i}.self_attn.out_proj"
            found.append(EditSite(self.component, attn, i, Role.TEXT_SELF_ATTN_OUT, hidden, hidden))
            found.append(EditSite(self.component, f"{_PREFIX}.{i}.mlp.fc2", i, Role.TEXT_MLP_OUT, hidden, inner))
        return tuple(sorted(found, key=lambda site: (site.layer, site.role)))

    @cached_property
    def _unet_sites(self) -> tuple[EditSite, ...]:
        unet = getattr(self.model.pipeline, UNET, None)
        return cross_attention_sites(unet) + linear_sites(unet)

    def sites(self, *roles: Role) -> tuple[EditSite, ...]:
        """Attention outputs and MLP outputs of every layer of the text encoder, first layer first.

        Those of the UNet follow where their roles are named: key and value projections of cross-attention, then the
        linear layers outside of it. Without roles the answer is the text encoder alone.
        """
        wanted = roles or _TEXT_ROLES
        in_text = tuple(site for site in self._sites if site.role in wanted)
        if not set(wanted) - set(_TEXT_ROLES):  # asking the UNet would read it from the disk
            return in_text
        return in_text + tuple(site for site in self._unet_sites if site.role in wanted)

    def span(self, prompt: str, subject: str, occurrence: int | None = None) -> SubjectSpan:
        """Token positions of the subject; see `Backend.span`."""
        return subject_span(self._tokenizer, prompt, subject, self.length, occurrence)

    def tokenize(self, prompts: Sequence[str], *, padded: bool) -> Tensor:
        """[b, t] token ids, right-padded to the longest prompt or (as the pipeline does) to `length`."""
        batch = self._tokenizer(
            list(prompts),
            padding="max_length" if padded else "longest",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        )
        device = self._root(self._encoder).embeddings.token_embedding.weight.device
        return torch.as_tensor(batch["input_ids"]).to(device)

    def capture(self, prompts: Sequence[str], sites: Sequence[EditSite], *, padded: bool = False) -> Activations:
        """Run the prompts as the pipeline does (no attention mask) and stop at the deepest site.

        For cross-attention that is the end of the text encoder; its streams are zero (`backends.unet` says why).
        """
        cross = [site for site in sites if site.component == UNET]
        check_no_linear(cross)
        taps = {site: Tap(self._module(site), self._norm(site)) for site in sites if site.component != UNET}
        tokens = self.tokenize(prompts, padded=padded)
        with evaluating(self._encoder), widened(self._encoder):
            with record(taps) as seen:
                if taps:
                    self._encoder(input_ids=tokens)
            if cross:
                record_cross_attention(self.model.pipeline.unet, cross, self._encoder(input_ids=tokens)[0], seen)
        missing = [site.name for site in sites if site not in seen.outputs]
        if missing:
            raise UnsupportedModelError("a site was not reached by the forward pass", value=", ".join(missing))
        return Activations(tokens, seen.inputs, seen.outputs, seen.streams)

    def weight(self, site: EditSite) -> Tensor:
        """The live weight of the site's linear layer; see `Backend.weight`."""
        module = self._module(site)
        if hasattr(module, "base_layer"):
            raise UnsupportedTensorError(
                f"{site.name} is wrapped by an adapter",
                value=type(module).__name__,
                hint="call unload_lora_weights() or delete_adapters(), then edit",
            )
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dtype not in _EDITABLE:
            seen = getattr(weight, "dtype", type(weight).__name__)
            hint = "load the model in float32, float16 or bfloat16"
            raise UnsupportedTensorError(f"{site.name} is not a plain floating-point weight", value=seen, hint=hint)
        if weight.is_meta:
            raise UnsupportedTensorError(
                f"{site.name} holds no numbers (meta device)", hint="load the weights, then edit"
            )
        if weight.is_inference() and not torch.is_inference_mode_enabled():
            hint = "load the model outside of torch.inference_mode()"
            raise UnsupportedTensorError(f"{site.name} was made in inference mode and cannot be written", hint=hint)
        if tuple(weight.shape) != (site.d_out, site.d_in):
            shapes = f"{tuple(weight.shape)}, expected {(site.d_out, site.d_in)}"
            raise UnsupportedTensorError(f"{site.name} has another shape", value=shapes)
        return weight

    def bias(self, site: EditSite) -> Tensor | None:
        """The bias of the site's linear layer."""
        bias: Tensor | None = self._module(site).bias
        return bias

    def features(self, prompts: Sequence[str]) -> Tensor:
        """Pooled output of the text encoder (the end-of-text position after the last layer norm)."""
        with evaluating(self._encoder):
            out = self._encoder(input_ids=self.tokenize(prompts, padded=False))
        pooled: Tensor = out.pooler_output
        return pooled.detach().float()

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        config = self._encoder.config
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
        shape = {key: getattr(config, key) for key in keys} | {"vocab_size": config.vocab_size, "length": self.length}
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        parts = {"architecture": shape, "tokenizer": [vocabulary, self._tokenizer.pad_token]}
        return {
            name: hashlib.sha256(json.dumps(part, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
            for name, part in parts.items()
        }

    def fingerprints(self) -> dict[str, str]:
        """Hashes of the encoder's architecture and the tokenizer's vocabulary."""
        return dict(self._fingerprints)

    def generate(
        self, pairs: Sequence[tuple[str, int]], *, steps: int, guidance: float, batch_size: int
    ) -> list[Image]:
        """Sample with the pipeline's own scheduler; one CPU generator per image, so batches do not mix seeds."""
        pipeline = self.model.pipeline
        images: list[Image] = []
        with quiet(pipeline):
            for i in range(0, len(pairs), batch_size):
                chunk = pairs[i : i + batch_size]
                out = pipeline(
                    prompt=[prompt for prompt, _ in chunk],
                    generator=[torch.Generator().manual_seed(seed) for _, seed in chunk],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    height=self.model.sampling.pixels,
                    width=self.model.sampling.pixels,
                )
                images += out.images
        return images

    def save(self, path: Path, *, overwrite: bool = False) -> Path:
        """The merged pipeline as a folder, or as a new single file if it came from one and `path` names one."""
        if path.suffix.lower() != ".safetensors":
            return save_pipeline(self.model.pipeline, path, overwrite=overwrite, variant=self.model.variant)
        if self.model.file is None:
            hint = "name a folder, or load the model from a .safetensors checkpoint"
            raise UnsupportedModelError("only a single-file model can be saved as one file", value=path.name, hint=hint)
        save_checkpoint(self, self.model.file, path)
        return path

    def _layer(self, site: EditSite) -> nn.Module:
        layers = self._root(self._encoder).encoder.layers
        if site.component != self.component or not 0 <= site.layer < len(layers):
            known = f"{len(layers)} layers in {self.component}"
            raise UnsupportedModelError("the model has no such edit site", value=site.name, cause=f"it has {known}")
        layer: nn.Module = layers[site.layer]
        return layer

    def _module(self, site: EditSite) -> Any:
        if site.component == UNET:
            unet = getattr(self.model.pipeline, UNET, None) or nn.Module()
            return (linear_layer if site.role in LINEAR_ROLES else cross_attention_layer)(unet, site)
        layer: Any = self._layer(site)
        for inner, module in (("self_attn.out_proj", layer.self_attn.out_proj), ("mlp.fc2", layer.mlp.fc2)):
            if site.path == f"{_PREFIX}.{site.layer}.{inner}":
                return module
        known = f"layer has self_attn.out_proj and mlp.fc2 in {_PREFIX}.{site.layer}"
        raise UnsupportedModelError("the model has no such edit site", value=site.name, cause=known)

    def _norm(self, site: EditSite) -> nn.Module:
        layer: Any = self._layer(site)
        norm: nn.Module = layer.layer_norm1 if site.role is Role.TEXT_SELF_ATTN_OUT else layer.layer_norm2
        return norm


class SD1(StableDiffusion):
    """Stable Diffusion 1.x: CLIP-L, 12 layers x 768 at true size."""

    name = "sd1"
    reference = "Stable Diffusion 1.x (Rombach et al. 2022, arXiv 2112.10752), OpenAI CLIP text encoder"
    activation = "quick_gelu"


class SD2(StableDiffusion):
    """Stable Diffusion 2.x: OpenCLIP ViT-H, 23 layers x 1024 at true size."""

    name = "sd2"
    reference = "Stable Diffusion 2.x, OpenCLIP text encoder (arXiv 2212.07143)"
    activation = "gelu"
