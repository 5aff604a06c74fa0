"""What edit sites see at single tokens: the form in which updaters read a model, and the plain way to fill it.

A forward pass shows all positions of a prompt, an updater needs one or two of each; `Backend.read` hands out just
those. The plain way is one forward pass over all prompts that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffedit.errors import RequestError
from diffedit.site import EditSite, SubjectSpan

if TYPE_CHECKING:
    from diffedit.interfaces import Backend

Place = tuple[SubjectSpan, int]
Numbers = npt.NDArray[np.int64]
Taker = Callable[[Numbers], tuple[Tensor, Tensor]]


class Rows:
    """What some sites see at n single tokens, in float32 (float64 for a float64 model).

    Args:
        inputs: per site [n, d_in], the layer's input.
        streams: per site [n, d_out], the residual stream that the layer's output is added to.
    """

    def __init__(self, inputs: Mapping[EditSite, Tensor], streams: Mapping[EditSite, Tensor]) -> None:
        self._inputs, self._streams = inputs, streams

    @property
    def inputs(self) -> Mapping[EditSite, Tensor]:
        """Per site [n, d_in]."""
        return self._inputs

    @property
    def streams(self) -> Mapping[EditSite, Tensor]:
        """Per site [n, d_out]."""
        return self._streams

    def take(self, site: EditSite, index: Numbers) -> tuple[Tensor, Tensor]:
        """Inputs [b, d_in] and streams [b, d_out] of one site at b of the n tokens, by their numbers."""
        rows = torch.from_numpy(index).to(self.inputs[site].device)
        return self.inputs[site].index_select(0, rows), self.streams[site].index_select(0, rows)


class LazyRows(Rows):
    """Rows that are computed as they are taken, so that of very many tokens only those in hand take memory.

    Args:
        count: n.
        takers: what `take` calls, per site. The model may have changed by then: what depends on its weights is kept
            from before.
    """

    def __init__(self, count: int, takers: Mapping[EditSite, Taker]) -> None:
        self._count, self._takers = count, takers

    @property
    def inputs(self) -> Mapping[EditSite, Tensor]:
        """Of all tokens."""
        return {site: inputs for site, (inputs, _) in self._all.items()}

    @property
    def streams(self) -> Mapping[EditSite, Tensor]:
        """Of all tokens."""
        return {site: streams for site, (_, streams) in self._all.items()}

    def take(self, site: EditSite, index: Numbers) -> tuple[Tensor, Tensor]:
        """Those of some tokens alone."""
        return self._takers[site](index)

    @cached_property
    def _all(self) -> dict[EditSite, tuple[Tensor, Tensor]]:
        return {site: self.take(site, np.arange(self._count)) for site in self._takers}


def read_by_prompt(
    backend: Backend, places: Sequence[Place], sites: Sequence[EditSite], prompts: Sequence[str], padded: bool
) -> Rows:
    """Run `Backend.capture` on the prompts and keep the rows that are asked for.

    Args:
        backend: the model.
        places: n tokens, each (span of its prompt, position).
        sites: as for `capture`.
        prompts: every prompt of `places` once.
        padded: see `capture`.
    """
    rows = {prompt: i for i, prompt in enumerate(prompts)}
    at = [rows[span.prompt] for span, _ in places], [position for _, position in places]
    seen = backend.capture(prompts, sites, padded=padded)
    exact = {site: torch.promote_types(backend.weight(site).dtype, torch.float32) for site in sites}
    return Rows(
        {site: seen.inputs[site][at].to(exact[site]) for site in sites},
        {site: seen.streams[site][at].to(exact[site]) for site in sites},
    )


def no_whole_word(prompt: str) -> RequestError:
    """The error for a template that glues the subject to other letters."""
    return RequestError(
        "the subject is no whole word in its template", value=repr(prompt), hint='put spaces around "{}"'
    )
