"""UCE, TIME and LocoEdit: one closed form for the layers through which the picture reads the text.

For each key or value projection W (no bias matters: it cancels)

    min_W'  e sum_i |W' k_i - W t_i|^2  +  p sum_j |(W' - W) q_j|^2  +  lam |W' - W|^2

with k_i a token's final state in the source prompt, t_i that of its partner in the target prompt, q_j tokens of
preserved names. The answer is UCE's equation 7; TIME's and LocoEdit's are the same without preserved names:

    W' = (lam W + e sum W t k^T + p sum W q q^T) (lam I + e sum k k^T + p sum q q^T)^-1

All layers read the same states, so the inverse is the same for all: it is factored once, and each layer's change is

    D = W T^T K' A^-1,    T = t - k  [n, d],    rank at most n.

    updater    source                                       tokens          lam    layers
    uce        Gandikota et al. 2024 (arXiv 2308.14761)     last of subject  0.5   all keys and values
    time       Orgad et al. 2023 (arXiv 2303.08084)         every position   0.1   all keys and values
    locoedit   Basu et al. 2024 (arXiv 2405.01008)          last of subject  0.01  a located window

How we differ: float64 and an SVD where the published scripts invert in float32; the subject is found by its characters
and not as the token before the end; an object becomes its target, and never the begin-of-text token that an empty
target selects in UCE's script; TIME pairs subjects that are no part of their target from their last token, where the
script stops with an error. Limits: the picture still reads end-of-text and padding positions, which `uce` and
`locoedit` leave as they are and which carry the subject too (`pairing="every"` pairs them).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffedit.delta import FLOAT32_TOL, Delta, Diagnostics, LowRank
from diffedit.errors import NonFiniteError, RequestError
from diffedit.interfaces import Backend, Updater
from diffedit.linalg.solve import RidgeSolution, ridge_factors
from diffedit.pairs import Held, Pairs, Wanted, check_contradictions
from diffedit.request import Kind, Request, held_names
from diffedit.site import EditSite, Location, Role
from diffedit.updaters.closed_form import diagnose
from diffedit.updaters.text_states import Pairing, Reading, preserved_states, request_states

Prompts = Literal["bare", "expanded", "request"]

_BARE = ("{}",)
_TIME = ("{}", "A photo of {}", "An image of {}", "A picture of {}")


class CrossAttention(Updater):
    """What the three methods share; a method is a set of defaults.

    Attributes:
        lam: larger keeps the old weights and weakens the edit; tokens of norm well above sqrt(lam) are fitted exactly.
        erase_scale: weight of each token pair of the subject; larger moves the subject further at the others' cost.
        preserve_scale: weight of each preserved token; larger holds preserved names stiller.
        prompts: which prompts are put around a name. `bare` the name alone, `expanded` the method's published prompts,
            `request` those of the request (the editor's default templates are broader than either).
        pairing: `subject` pairs the tokens that the location's rule selects; `every` all positions up to the last, the
            preserved names' too. The picture reads all of them, so `subject` alone may leave the subject readable.
        pair_tol: what the prompts around one name have in common up to this share is kept once. Larger makes smaller
            files, 0 keeps one row for each pair.
    """

    roles = (Role.UNET_CROSS_ATTN_K, Role.UNET_CROSS_ATTN_V)
    locator = "cross-attention"

    lam: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    erase_scale: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    preserve_scale: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    prompts: Prompts = "bare"
    pairing: Pairing = "subject"
    pair_tol: float = Field(default=1e-4, ge=0, lt=1)

    _expanded: ClassVar[Mapping[Kind, tuple[str, ...]]] = {"object": _BARE, "style": _BARE}

    def solve(self, backend: Backend, requests: Sequence[Request], location: Location) -> Delta:
        """One joint solve of all requests for all sites of the location.

        Raises:
            ContradictionError: the same key is asked for two different values at the subjects' own tokens. Where all
                positions are paired, those around the subjects are much alike, and least squares averages them.
        """
        pairs = self.pairs(backend, requests, location)
        own, probe = pairs, location.sites[0]
        if self.pairing == "every" and len(requests) > 1:
            alone = self.model_copy(update={"pairing": "subject"})
            own = alone.pairs(backend, requests, dataclasses.replace(location, sites=(probe,)))
        check_contradictions(own[probe], [request.subject for request in requests])
        return self.solve_pairs(pairs)

    def solve_pairs(self, pairs: Mapping[EditSite, Pairs]) -> Delta:
        """The same solve from pairs that were collected before."""
        return self._solved(pairs, keep=True)

    def _solved(self, pairs: Mapping[EditSite, Pairs], keep: bool) -> Delta:
        factors: dict[EditSite, LowRank] = {}
        diagnostics: dict[EditSite, Diagnostics] = {}
        for site, solution in shared_factors(pairs, self.lam, self.preserve_scale).items():
            change = LowRank(solution.up, solution.down).compress(FLOAT32_TOL)
            factors[site] = change.to(torch.float32)
            diagnostics[site] = diagnose(solution, change, pairs[site])
        return Delta(factors, diagnostics, pairs if keep else {})

    def _prepared(self, request: Request) -> Request:
        if self.prompts == "request":
            return request
        templates = _BARE if self.prompts == "bare" else self._expanded[request.kind]
        return request.model_copy(update={"templates": templates})

    def pairs(self, backend: Backend, requests: Sequence[Request], location: Location) -> dict[EditSite, Pairs]:
        """What the solve starts from, at each site; the keys of all sites are the same tensors."""
        requests = [self._prepared(request) for request in requests]
        _check_sites(location.sites)
        probe = location.sites[0]
        how = Reading(location.tokens, self.pairing, self.erase_scale, self.pair_tol)
        states = [request_states(backend, probe, request, how) for request in requests]
        held: dict[tuple[str, str], Held] = {}
        weight = backend.weight(probe)
        for request, name in held_names(requests):
            key = name.casefold(), how.group(request)
            if key not in held:
                keys, count = preserved_states(backend, probe, request, name, how)
                held[key] = Held(name, key[1], _store(keys, weight), count)
        keys_of = [_store(entry.keys, weight) for entry in states]
        found = {}
        for site in location.sites:
            live = backend.weight(site).detach().double()
            _check_finite(live, site)
            wanted = tuple(
                Wanted(keys, _store(entry.shifts.to(live.device) @ live.T, weight), entry.count, entry.group)
                for keys, entry in zip(keys_of, states, strict=True)
            )
            found[site] = Pairs(wanted, tuple(held.values()), float(torch.linalg.vector_norm(live)))
        return found


class UCE(CrossAttention):
    """Unified Concept Editing: the subject's last token is read as the target's, preserved names as before."""

    name = "uce"
    reference = "Gandikota et al. 2024, arXiv 2308.14761, UCE"
    preserves = True

    lam: float = Field(default=0.5, ge=0, allow_inf_nan=False)

    _expanded: ClassVar[Mapping[Kind, tuple[str, ...]]] = {
        "object": ("{}", "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
        "style": ("{}", "painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
    }


class LocoEdit(CrossAttention):
    """LocoEdit: UCE without preserved names, in the window of layers that LocoGen finds."""

    name = "locoedit"
    reference = "Basu et al. 2024, arXiv 2405.01008, LocoEdit"
    locator = "locogen"

    lam: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    prompts: Prompts = "expanded"

    _expanded: ClassVar[Mapping[Kind, tuple[str, ...]]] = {
        "object": ("{}", "image of {}", "photo of {}", "picture of {}"),
        "style": ("{}", "painting in the style of {}", "photo in the style of {}", "picture in the style of {}"),
    }


class TIME(CrossAttention):
    """TIME: every position of the prompt is read as its partner in the target prompt.

    Its pairs hold nearly every direction of the text space, so edits of it cannot be told apart again: they are not
    kept, and such edits do not compose.
    """

    name = "time"
    reference = "Orgad et al. 2023, arXiv 2303.08084, TIME"

    prompts: Prompts = "expanded"
    pairing: Pairing = "every"

    _expanded: ClassVar[Mapping[Kind, tuple[str, ...]]] = {"object": _TIME, "style": _TIME}

    def solve(self, backend: Backend, requests: Sequence[Request], location: Location) -> Delta:
        """One joint solve of all requests for all sites; with `every` the location's token rule is not used."""
        return self._solved(self.pairs(backend, requests, location), keep=False)

    def solve_pairs(self, pairs: Mapping[EditSite, Pairs]) -> Delta:
        """Not offered; see the class.

        Raises:
            NotComposableError: always.
        """
        return Updater.solve_pairs(self, pairs)


def shared_factors(pairs: Mapping[EditSite, Pairs], lam: float, preserve_scale: float) -> dict[EditSite, RidgeSolution]:
    """The ridge solve of `linalg.solve` for many layers, factored once for all that have the same keys.

    Args:
        pairs: per site, as `solve` collects them.
        lam: see `CrossAttention`.
        preserve_scale: weight of the preserved keys.

    Returns:
        Per site up [d_out, r] and down [r, d_in] in float64, with the site's own residual and drift.
    """
    groups: list[tuple[Tensor, Tensor, list[EditSite], list[Tensor]]] = []
    for site, data in pairs.items():
        keys, residuals, held = data.stack()
        for known, kept, sites, rows in groups:
            if torch.equal(known, keys) and torch.equal(kept, held):
                sites.append(site)
                rows.append(residuals)
                break
        else:
            groups.append((keys, held, [site], [residuals]))
    found: dict[EditSite, RidgeSolution] = {}
    for keys, held, sites, rows in groups:
        still = held.new_full((held.shape[0],), preserve_scale)
        whole = ridge_factors(keys, torch.cat(rows, 1), lam=lam, preserve=held, preserve_weights=still)
        fit, moved = keys @ whole.down.T, (held * still.sqrt()[:, None]) @ whole.down.T
        ups = torch.split(whole.up, [site.d_out for site in sites])
        for site, wanted, up in zip(sites, rows, ups, strict=True):
            size = float(torch.linalg.vector_norm(wanted)) or 1.0
            found[site] = RidgeSolution(
                up=up,
                down=whole.down,
                condition=whole.condition,
                effective_rank=whole.effective_rank,
                residual=float(torch.linalg.vector_norm(wanted - fit @ up.T)) / size,
                preserve_drift=float(torch.linalg.vector_norm(moved @ up.T)) / size,
            )
    return {site: found[site] for site in pairs}


def _check_sites(sites: Sequence[EditSite]) -> None:
    spread = sorted({(site.component, site.d_in) for site in sites})
    if len(spread) > 1:
        raise RequestError("the sites do not read the same text states", value=spread, hint="edit one model part")


def _check_finite(weight: Tensor, site: EditSite) -> None:
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise NonFiniteError(
            f"the weight of {site.name} is not finite", value=f"{bad} numbers", hint="reload the model"
        )


def _store(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows as the edit keeps them, rounded *before* the solve, so that what is kept gives the same change again."""
    return rows.to(torch.float64 if weight.dtype is torch.float64 else torch.float32)
