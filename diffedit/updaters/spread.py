"""One change of a text encoder's hidden states, spread over the MLPs of several layers: the second stage of MEMIT.

Concept i is to have the state v*_i [d] after layer L, at its last token. The layers l of a range that ends at L are
edited in turn, each by a ridge solve that takes its even share of what is still missing *under the edits so far*:

    R_l = (v* - h_L) / (layers left)        [n, d_out]    h_L: present states after layer L
    D_l = a R_l^T K_l (w (1 - a) C_l + a K_l^T K_l + p P_l^T P_l)^-1        [d_out, d_in]

with K_l [n, d_in] the present keys of layer l (one per concept: the mean over its prompts), C_l the second moment of
everyday keys, w its weight, a the edit weight, P_l the keys of preserved names with weight p. Keys and states are read
again after every layer. The edits so far live in forward hooks, which add x D^T to a layer's output: no weight changes.

Source: Meng et al. 2023 (MEMIT, arXiv 2210.07229), eq. 14, 19 and 20; a and w as in Xiong et al. 2024 (EMCID, arXiv
2403.13807). Limits: C_l is that of the unedited model, as published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffedit.delta import LowRank
from diffedit.interfaces import Backend
from diffedit.linalg.solve import RidgeSolution, ridge_factors
from diffedit.site import EditSite
from diffedit.updaters.layers import edited


@dataclass(frozen=True)
class Concept:
    """Where one concept is read.

    Attributes:
        prompts: with the concept's name in them.
        positions: the last token of the name in each.
    """

    prompts: tuple[str, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Balance:
    """What counts how much; see the module's text.

    Attributes:
        edit: a, in (0, 1].
        moment: w.
        preserve: p.
    """

    edit: float
    moment: float
    preserve: float


def mean_states(backend: Backend, concepts: Sequence[Concept], site: EditSite, last: EditSite) -> tuple[Tensor, Tensor]:
    """Keys [n, d_in] of a layer and states [n, d_out] after the layer `last`, float64: means over a concept's prompts.

    Every concept runs in a batch of its own, so that its numbers do not depend on the others.
    """
    keys, states = [], []
    for concept in concepts:
        seen = backend.capture(concept.prompts, sorted({site, last}))
        rows = torch.arange(len(concept.prompts), device=seen.tokens.device)
        at = torch.tensor(concept.positions, device=seen.tokens.device)
        after = seen.streams[last].double() + seen.outputs[last].double()
        keys.append(seen.inputs[site].double()[rows, at].mean(0))
        states.append(after[rows, at].mean(0))
    return torch.stack(keys), torch.stack(states)


def spread(
    backend: Backend,
    sites: Sequence[EditSite],
    concepts: Sequence[Concept],
    targets: Tensor,
    preserved: Sequence[Concept],
    roots: Mapping[EditSite, Tensor],
    balance: Balance,
) -> dict[EditSite, RidgeSolution]:
    """The changes of all layers.

    Args:
        backend: the model.
        sites: second layers of MLPs, first layer first; the states are those after the last.
        concepts: n concepts.
        targets: [n, d_out], v*.
        preserved: concepts that are to stay.
        roots: per site [d_in, d_in], a root of C.
        balance: what counts how much.

    Raises:
        IllConditionedError, NonFiniteError: see `linalg.solve`.
    """
    solved: dict[EditSite, RidgeSolution] = {}
    for done, site in enumerate(sites):
        with edited(backend, {other: LowRank(found.up, found.down) for other, found in solved.items()}):
            keys, states = mean_states(backend, concepts, site, sites[-1])
            kept = mean_states(backend, preserved, site, sites[-1])[0] if preserved else keys[:0]
        solved[site] = ridge_factors(
            keys,
            (targets.to(states) - states) / (len(sites) - done),
            lam=0.0,
            weights=keys.new_full((len(keys),), balance.edit),
            preserve=kept,
            preserve_weights=kept.new_full((len(kept),), balance.preserve),
            moment_root=roots[site].to(keys) * (balance.moment * (1.0 - balance.edit)) ** 0.5,
        )
    return solved
