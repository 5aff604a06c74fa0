"""A complete plugin in one file: a toy model family, a locator and an updater.

The model paints a prompt as one flat colour. Each word has a fixed vector; two linear layers, each behind a causal mean
over the words so far, turn them into the colour. It is no diffusion model at all, which is the point: diffedit edits it
through `WordsBackend` alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from pydantic import Field
from safetensors.torch import save
from torch import Tensor, nn

from diffedit import (
    Activations,
    Backend,
    Delta,
    EditSite,
    Location,
    Locator,
    QuickFix,
    Request,
    Role,
    SubjectSpan,
    TokenRule,
    Updater,
)
from diffedit.errors import SubjectTruncatedError, UnsupportedModelError
from diffedit.io.folder import write_folder
from diffedit.text import locate

WIDTH, LAYERS, LENGTH = 16, 2, 12


class WordsPipeline:
    """The toy model; `components` is what diffedit asks of every pipeline."""

    def __init__(self, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        for parameter in self.layers.parameters():
            parameter.data = torch.randn(parameter.shape, generator=random) / WIDTH**0.5
        self.components = {"text_encoder": self.layers}

    @staticmethod
    def tokens(prompt: str) -> list[str]:
        return ["<start>", *prompt.lower().split(), "<end>"][:LENGTH]

    @staticmethod
    def embed(word: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:6], "big")
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))

    def run(self, prompts: Sequence[str], padded: bool = False) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """Final state [b, t, WIDTH] and, per layer, (input, output, stream before the layer)."""
        rows = [self.tokens(prompt) for prompt in prompts]
        longest = LENGTH if padded else max(map(len, rows))
        rows = [row + ["<end>"] * (longest - len(row)) for row in rows]
        stream = torch.stack([torch.stack([self.embed(word) for word in row]) for row in rows])
        counts = torch.arange(1, longest + 1)[:, None]
        seen = []
        for layer in self.layers:
            mixed = 0.7 * stream + 0.3 * stream.cumsum(1) / counts
            output = layer(mixed)
            seen.append((mixed, output, stream))
            stream = stream + output
        return stream, seen


class WordsBackend(Backend):
    """All that diffedit needs to know about `WordsPipeline`."""

    name = "words"
    reference = "the plugin package in diffedit's own tests"

    @classmethod
    def accepts(cls, pipeline: Any) -> bool:
        return isinstance(pipeline, WordsPipeline)

    def sites(self, *roles: Role) -> tuple[EditSite, ...]:
        if roles and Role.TEXT_SELF_ATTN_OUT not in roles:
            return ()
        role = Role.TEXT_SELF_ATTN_OUT
        return tuple(EditSite("text_encoder", f"text_model.layers.{i}", i, role, WIDTH, WIDTH) for i in range(LAYERS))

    def span(self, prompt: str, subject: str, occurrence: int | None = None) -> SubjectSpan:
        start, stop = locate(prompt, subject, occurrence)
        first = 1 + len(prompt[:start].split())
        end = first + len(prompt[start:stop].split())
        eos = min(len(prompt.split()) + 1, LENGTH - 1)
        if end > eos:
            raise SubjectTruncatedError(
                f"the model reads {LENGTH} words", value=repr(prompt), hint="shorten the prompt"
            )
        return SubjectSpan(prompt, subject, first, end, eos)

    @torch.no_grad()
    def capture(self, prompts: Sequence[str], sites: Sequence[EditSite], *, padded: bool = False) -> Activations:
        state, seen = self.model.pipeline.run(prompts, padded)
        inputs, outputs, streams = ({site: seen[site.layer][part] for site in sites} for part in range(3))
        return Activations(torch.zeros(state.shape[:2], dtype=torch.long), inputs, outputs, streams)

    def weight(self, site: EditSite) -> Tensor:
        return self._layer(site).weight

    def bias(self, site: EditSite) -> Tensor | None:
        return self._layer(site).bias

    @torch.no_grad()
    def features(self, prompts: Sequence[str]) -> Tensor:
        state, _ = self.model.pipeline.run(prompts)
        return torch.stack([state[row, len(WordsPipeline.tokens(prompt)) - 1] for row, prompt in enumerate(prompts)])

    def fingerprints(self) -> dict[str, str]:
        return {"architecture": hashlib.sha256(f"{WIDTH} {LAYERS} {LENGTH}".encode()).hexdigest()}

    def generate(
        self, pairs: Sequence[tuple[str, int]], *, steps: int, guidance: float, batch_size: int
    ) -> list[Image.Image]:
        vectors = self.features([prompt for prompt, _ in pairs])
        colours = [tuple(int(value) for value in vector[:3].sigmoid() * 255) for vector in vectors]
        return [Image.new("RGB", (8, 8), colour) for colour in colours]

    def save(self, path: Path, *, overwrite: bool = False) -> Path:
        return write_folder(
            path, {"words.safetensors": save(self.model.pipeline.layers.state_dict())}, overwrite=overwrite
        )

    def _layer(self, site: EditSite) -> Any:
        if site not in self.sites():
            raise UnsupportedModelError("the model has no such edit site", value=site.name, hint="see backend.sites()")
        return self.model.pipeline.layers[site.layer]


class LastLayer(Locator):
    """Always the last layer."""

    name = "words-last"
    reference = "none: a rule of thumb"

    def locate(self, backend: Backend, requests: Sequence[Request]) -> Location:
        return Location(backend.sites()[-1:], TokenRule.LAST_SUBJECT, self.name, self.reference)


class Strength(Updater):
    """QuickFix, scaled.

    Attributes:
        strength: share of the change that is kept; below 1 the subject is only weakened.
    """

    name = "words-strength"
    reference = "Basu et al. 2023, scaled"
    roles: ClassVar[tuple[Role, ...]] = (Role.TEXT_SELF_ATTN_OUT,)

    strength: float = Field(default=1.0, gt=0, le=1)

    def solve(self, backend: Backend, requests: Sequence[Request], location: Location) -> Delta:
        return QuickFix(lam=1e-6).solve(backend, requests, location) * self.strength
