"""Causal tracing: measure where a concept lives instead of taking a paper's word for it.

Source: Basu et al. 2023 (arXiv 2310.13730), after ROME (Meng et al. 2022, arXiv 2202.05262). Noise is added to the
subject's word embeddings; then one state at a time is put back to what it was, and what it brings back is its indirect
effect. The state with the largest effect is where to edit.

Differs from the paper: effects are signed and have intervals, and nothing is called causal without them (`table`); the
default measure is the predicted noise, which needs no judge and costs a small part of pictures (`measures`); the size
of the noise, which the paper does not state, is a setting. In a UNet, see `backends.unet_runs` for what is restored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from diffedit import registry
from diffedit.interfaces import Backend, Locator
from diffedit.locators.states import Tokens
from diffedit.locators.table import Effect, TraceTable
from diffedit.locators.tracer import Tracer, make_tracer
from diffedit.request import Request
from diffedit.site import Location, TokenRule


class CausalTracing(Locator):
    """Traces the subject in its own prompts and takes the states with the largest indirect effect.

    Attributes:
        component: `text_encoder` or `unet`.
        measure: `denoising`, `embedding`, `image`, or that of a plugin; `image` draws one picture per state.
        measure_settings: fields of the measure, such as {"scorer": "openai/clip-vit-base-patch32"}.
        kinds: kinds of part to restore; none means all.
        tokens: token positions to restore in a text encoder; `each` gives every position a column of its own.
        edit_tokens: token rules that the chosen location may use. Every prompt has an end-of-text token, so an edit
            there reaches other concepts too; that is why `eos` is traced but not chosen by default.
        sites: at most so many of the best states are edited together, all at the same tokens; each must be causal. The
            updater shares the work among them.
        window: consecutive parts of one kind restored together; wider finds knowledge that is spread over layers.
        noise: standard deviation of the corruption in multiples of that of the word embeddings; too little leaves the
            concept in place.
        noise_std: the same as an absolute number, instead.
        seeds: draws of the noise and of the starting latents per prompt; more narrow the intervals.
        prompts: at most so many of a request's prompts are traced.
        effect: what orders the states: `signed`, or the paper's `absolute` and `raw`.
        least_total_effect: smallest total effect that counts; default: the measure's own.
        branches: in a UNet, restore the `conditional` branch, which the noise enters, or `both`.
        batch_size: runs computed together; default: as many as half of the free memory holds.
    """

    name = "causal-trace"
    reference = "Basu et al. 2023, arXiv 2310.13730, causal tracing"

    component: Literal["text_encoder", "unet"] = "text_encoder"
    measure: str = "denoising"
    measure_settings: dict[str, Any] = Field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    tokens: tuple[Tokens, ...] = Field(default=("last_subject", "all_subject", "eos"), min_length=1)
    edit_tokens: tuple[TokenRule, ...] = Field(default=(TokenRule.LAST_SUBJECT, TokenRule.ALL_SUBJECT), min_length=1)
    sites: int = Field(default=1, ge=1)
    window: int = Field(default=1, ge=1)
    noise: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    noise_std: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    seeds: int = Field(default=3, ge=1)
    prompts: int = Field(default=6, ge=1)
    effect: Effect = "signed"
    least_total_effect: float | None = Field(default=None, ge=0)
    branches: Literal["conditional", "both"] = "conditional"
    batch_size: int | None = Field(default=None, ge=1)

    def locate(self, backend: Backend, requests: Sequence[Request]) -> Location:
        """Trace every subject and alias of the requests; the effects are averaged over all of their prompts.

        Raises:
            NoCausalSiteError: no state of certain effect.
        """
        table = self.finish(self.tracer(backend, self.probes(requests), seed=requests[0].seed).all())
        return table.locate(self.name, self.reference, self.effect, self.edit_tokens, self.sites)

    def probes(self, requests: Sequence[Request]) -> list[tuple[str, str]]:
        """(prompt, subject) pairs: evenly spread over the requests' templates, `prompts` per name."""
        found = []
        for request in requests:
            for name in request.names:
                prompts = [text for text, _ in request.render(name)]
                step = max(1, len(prompts) / self.prompts)
                chosen = [prompts[int(i * step)] for i in range(min(self.prompts, len(prompts)))]
                found += [(prompt, name) for prompt in dict.fromkeys(chosen)]
        return found

    def tracer(self, backend: Backend, probes: Sequence[tuple[str, str]], *, seed: int = 0) -> Tracer:
        """The work to do for these probes, checked; `seed` is the first of the seeds."""
        measure = registry.configure("measures", self.measure, self.measure_settings)
        return make_tracer(
            backend,
            measure,
            probes,
            range(seed, seed + self.seeds),
            component=self.component,
            kinds=self.kinds,
            tokens=self.tokens,
            noise=self.noise,
            noise_std=self.noise_std,
            window=self.window,
            both_branches=self.branches == "both",
            batch_size=self.batch_size,
        )

    def finish(self, table: TraceTable) -> TraceTable:
        """The table with this locator's own threshold, if it has one."""
        if self.least_total_effect is None:
            return table
        return replace(table, least_total_effect=self.least_total_effect)
