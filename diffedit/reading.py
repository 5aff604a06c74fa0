"""What edit sites see at single tokens: the form in which updaters read a model, and the plain way to fill it.

A forward pass shows all positions of a prompt, an updater needs one or two of each; `Backend.read` hands out just
those. The plain way is one forward pass over all prompts that are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffedit.errors import RequestError
from diffedit.site import EditSite, SubjectSpan

if TYPE_CHECKING:
    from diffedit.interfaces import Backend

Place = tuple[SubjectSpan, int]


@dataclass(frozen=True, eq=False)
class Rows:
    """What some sites see at n single tokens, in float32 (float64 for a float64 model).

    Attributes:
        inputs: per site [n, d_in], the layer's input.
        streams: per site [n, d_out], the residual stream that the layer's output is added to.
    """

    inputs: Mapping[EditSite, Tensor]
    streams: Mapping[EditSite, Tensor]


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
