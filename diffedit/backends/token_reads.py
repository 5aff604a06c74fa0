"""Single tokens of many prompts, as updaters read them, for a CLIP text encoder.

At the first layer's attention, the default edit site, `first_layer` computes them without running the model, each
independent of the others; everywhere else a forward pass runs that stops at the deepest site.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from diffedit.backends.first_layer import FirstLayer, plain_first_layer
from diffedit.backends.spans import subject_spans
from diffedit.interfaces import Backend
from diffedit.reading import LazyRows, Place, Rows
from diffedit.site import EditSite, Role, SubjectSpan


class TokenReads(Backend):
    """`spans`, `read` and `positions` of a backend with one CLIP text encoder and its tokenizer."""

    @property
    @abstractmethod
    def _encoder(self) -> Any: ...

    @property
    @abstractmethod
    def _tokenizer(self) -> Any: ...

    @property
    @abstractmethod
    def length(self) -> int:
        """Positions that the encoder reads, special tokens included."""

    @staticmethod
    @abstractmethod
    def _root(encoder: Any) -> Any: ...

    def spans(self, phrases: Sequence[tuple[str, str, int]]) -> list[SubjectSpan]:
        """Token positions of many subjects, in few calls of the tokenizer; see `Backend.spans`."""
        return subject_spans(self._tokenizer, phrases, self.length)

    def positions(self, prompt: str, site: EditSite) -> int:
        """`length`, whatever the prompt and the site."""
        return self.length

    def read(self, places: Sequence[Place], sites: Sequence[EditSite], *, padded: bool = False) -> Rows:
        """What the sites see at single tokens; see `Backend.read` and the module's text."""
        if self.independent(sites, padded=padded) and all(position < len(span.tokens) for span, position in places):
            with torch.no_grad(), torch.autocast(device_type=self.weight(sites[0]).device.type, enabled=False):
                layer = FirstLayer(self._root(self._encoder), places)
            return LazyRows(len(places), {sites[0]: layer.take})
        return super().read(places, sites, padded=padded)

    def independent(self, sites: Sequence[EditSite], *, padded: bool = False) -> bool:
        """At the first layer's attention, as long as its modules are plain and padding is not asked for."""
        first = len(sites) == 1 and sites[0].role is Role.TEXT_SELF_ATTN_OUT and sites[0].layer == 0
        return first and not padded and plain_first_layer(self._encoder, self._root(self._encoder))
