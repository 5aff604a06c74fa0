"""Proves that a trace finds a planted site, does not depend on the order of runs, and refuses what is not there."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from pydantic import ValidationError

from diffedit import registry
from diffedit.errors import NoCausalSiteError, RequestError, SubjectNotFoundError, UnsupportedModelError
from diffedit.interfaces import Backend
from diffedit.intervention import Part
from diffedit.locators.causal_trace import CausalTracing
from diffedit.locators.states import column_names, column_positions, windows
from diffedit.locators.statistics import Bootstrap
from diffedit.locators.table import TraceTable, Unit
from diffedit.request import make_request
from diffedit.site import SubjectSpan, TokenRule
from diffedit.traceable import traceable

PLANTED = "text_model.encoder.layers.1.self_attn.out_proj"
PROBES = [("a photo of a dog", "dog"), ("the dog in the sun", "dog"), ("a cat", "cat")]


def run(backend, probes=PROBES, **settings):
    locator = CausalTracing(**{"measure": "embedding", "seeds": 2, **settings})
    return locator.finish(locator.tracer(backend, probes).all())


def test_a_planted_site_is_found(planted):
    table = run(planted, tokens=("last_subject", "eos", "padding"))
    best = table.best_state()
    assert (best.part.name, best.column) == ("self_attn-1", "padding") and best.causal
    for state in table.states:
        if state.part.name != "self_attn-1":
            assert abs(state.share) < 1e-9, state  # the silenced parts carry nothing
    editable = table.locate("m", "r", rules=tuple(TokenRule))
    assert [site.path for site in editable.sites] == [PLANTED]


def test_a_planted_site_is_found_with_predicted_noise_and_by_locate(planted):
    request = make_request(subject="dog", target="cat")
    location = CausalTracing(measure="denoising", seeds=2, prompts=2).locate(planted, [request])
    assert [site.path for site in location.sites] == [PLANTED]
    assert location.method == "causal-trace" and len(location.scores) == 1 and location.scores[0] > 0


def test_permuting_prompts_changes_nothing(plain):
    first, second = run(plain), run(plain, PROBES[::-1])
    assert first.units == second.units and first.columns == second.columns
    assert np.array_equal(first.restored, second.restored) and first.states == second.states


def test_all_layers_restored_in_a_window_bring_more_back_than_one(plain):
    one, all_layers = run(plain, kinds=("self_attn",)), run(plain, kinds=("self_attn",), window=3)
    assert [len(w) for w in windows(all_layers.parts, 3)] == [3, 2, 1]
    a = {(s.part.name, s.column): s.effect.mean for s in one.states}
    b = {(s.part.name, s.column): s.effect.mean for s in all_layers.states}
    assert b["self_attn-2", "eos"] == a["self_attn-2", "eos"]
    assert b["self_attn-0", "eos"] != a["self_attn-0", "eos"]


def test_a_window_that_wins_is_edited_as_a_whole(planted):
    found = run(planted, kinds=("self_attn",), window=2, tokens=("eos",)).locate("m", "r")
    assert [site.layer for site in found.sites] == [0, 1] and len(found.scores) == 2


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_a_trace_names_as_many_sites_as_are_asked_for_and_causal(plain, planted, asked):
    request = make_request(subject="dog", target="cat")
    locator = CausalTracing(
        measure="embedding", seeds=2, prompts=2, sites=asked, tokens=("eos",), edit_tokens=(TokenRule.EOS,)
    )
    table = locator.finish(locator.tracer(plain, locator.probes([request])).all())
    states = table.best_states(asked, rules=locator.edit_tokens)
    pool = [s for s in table.states if s.causal and s.part.sites and s.column == states[0].column]
    assert 1 <= len(states) == min(asked, len(pool))
    assert [s.effect.mean for s in states] == sorted((s.effect.mean for s in pool), reverse=True)[: len(states)]
    found = locator.locate(plain, [request])
    assert len(found.sites) == len(found.scores) == len(states)
    assert dict(zip(found.sites, found.scores, strict=True)) == {s.part.sites[0]: s.effect.mean for s in states}
    (one,) = locator.locate(planted, [request]).sites
    assert one.layer == 1  # the only causal part, however many are asked for


def test_equal_positions_are_run_once_and_score_the_same(plain):
    table = run(plain, [("a dog", "dog")], tokens=("last_subject", "all_subject", "each"))
    tracer = CausalTracing(measure="embedding", tokens=("last_subject", "all_subject")).tracer(
        plain, [("a dog", "dog")]
    )
    span = plain.span("a dog", "dog")
    if span.stop - span.start == 1:
        assert tracer.runs_per_unit() == 2 + len(tracer.parts)
        assert np.array_equal(table.restored[:, :, 0], table.restored[:, :, 1])
    assert np.array_equal(table.restored[:, :, 0], table.restored[:, :, table.columns.index("+0")])


def test_a_position_that_a_prompt_lacks_counts_in_no_mean(plain):
    table = run(plain, [("a dog", "dog"), ("a dog in the sun", "dog")], tokens=("each",))
    late = table.columns[-1]
    counts = {state.column: state.effect.n for state in table.states}
    assert counts["+0"] == 4 and counts[late] == 2
    assert np.isnan(table.restored).any()


@pytest.mark.parametrize("branches", ["conditional", "both"])
def test_a_unet_trace_has_a_row_per_part(plain, branches):
    table = run(plain, PROBES[:2], component="unet", measure="denoising", branches=branches)
    assert table.parts == plain.parts("unet") and table.columns == ("whole",)
    assert table.total_effect.mean > 0 and any(state.causal for state in table.states)
    cross = run(plain, PROBES[:2], component="unet", measure="denoising", kinds=("cross_attn",))
    assert {site.component for site in cross.locate("m", "r").sites} == {"unet"}


def test_the_measures_agree_that_clean_scores_best(plain):
    for measure in ("embedding", "denoising"):
        table = run(plain, measure=measure)
        assert (table.clean == 0).all() and (table.corrupted < 0).all()


def test_the_image_measure_scores_pictures(plain):
    table = run(plain, PROBES[:1], measure="image", kinds=("self_attn",), tokens=("last_subject",), seeds=1)
    assert table.restored.shape == (1, 3, 1) and (np.abs(table.restored) <= 1).all()
    with pytest.raises(NoCausalSiteError, match="a single run says nothing"):
        table.best_state()


def table_of(clean, corrupted, restored, least=0.0):
    units = tuple(Unit(f"p{i}", "s", 0) for i in range(len(clean)))
    parts = tuple(Part("text_encoder", i, "mlp", i, f"x{i}") for i in range(np.asarray(restored).shape[1]))
    arrays = [np.asarray(values, dtype=float) for values in (clean, corrupted)]
    restored = np.asarray(restored, dtype=float)[:, :, None]
    return TraceTable("text_encoder", parts, ("last_subject",), units, *arrays, restored, 1, least)


def test_effects_by_hand():
    table = table_of([1, 1, 1], [0, 0.2, 0.4], [[0.5, 0], [0.7, 0.1], [0.9, 0.2]])
    assert table.total_effect.mean == pytest.approx(0.8)
    first, second = table.states
    assert first.effect.mean == pytest.approx(0.5) and first.share == pytest.approx(0.625)
    assert second.effect.mean == pytest.approx(-0.1) and not second.causal
    assert table.scores("absolute")[1, 0] == pytest.approx(0.1)
    assert table.scores("raw")[0, 0] == pytest.approx(0.7)
    assert table.best_state().part.layer == 0
    assert (first.effect.low, first.effect.high) == (pytest.approx(0.5), pytest.approx(0.5))


def test_a_state_that_pushes_away_is_never_causal_whatever_the_order():
    table = table_of([1, 1], [0, 0], [[-0.9, 0.1], [-0.8, 0.2]])
    assert table.best_state().part.layer == 1
    assert table.best_state("absolute").part.layer == 1
    away = table_of([1, 1], [0, 0], [[-0.9, -0.1], [-0.8, -0.2]])
    with pytest.raises(NoCausalSiteError, match=r"for certain.*first is mlp-0.*lies above zero"):
        away.best_state("absolute")


def test_a_certain_state_is_named_though_an_uncertain_one_scores_higher():
    table = table_of([1] * 4, [0] * 4, [[0.5, 2.4], [0.49, -0.2], [0.5, 1.0], [0.5, -0.2]])
    assert not table.states[1].causal and table.states[1].effect.mean > table.states[0].effect.mean
    assert table.best_state().part.layer == 0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (table_of([0.1, -0.1, 0.1], [0, 0, 0], [[0.1]] * 3), "did not remove the concept"),
        (table_of([1e-4] * 3, [0] * 3, [[1e-4]] * 3, least=0.01), "at least 0.01 is needed"),
        (table_of([1] * 4, [0] * 4, [[0.5], [-0.5], [0.4], [-0.5]]), "lies above zero"),
        (table_of([1], [0], [[1]]), "a single run"),
    ],
    ids=["noisy", "small", "covers zero", "one run"],
)
def test_what_is_not_certain_is_refused(table, message):
    with pytest.raises(NoCausalSiteError, match=message):
        table.best_state()


def test_states_without_a_site_are_no_location():
    table = table_of([1, 1], [0, 0], [[0.9], [0.8]])
    assert table.best_state().causal
    with pytest.raises(NoCausalSiteError, match="none of the traced states can be edited"):
        table.locate("m", "r")


def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        prompts = rng.normal(size=20)
        values = np.repeat(prompts, 3) + rng.normal(size=60)
        found = Bootstrap([i // 3 for i in range(60)], resamples=400).estimate(values)
        hits += found.low <= 0 <= found.high
    assert 180 <= hits <= 200  # two stages err on the wide side


def test_prompts_weigh_the_same_however_many_seeds_they_have():
    assert Bootstrap(["a", "a", "a", "b"]).estimate(np.array([0.0, 0.0, 0.0, 1.0])).mean == pytest.approx(0.5)


def test_missing_runs_and_single_runs_have_honest_intervals():
    found = Bootstrap(["a", "b"]).estimate(np.array([1.0, math.nan]))
    assert (found.mean, found.low, found.high, found.n) == (1.0, -math.inf, math.inf, 1)


def test_columns():
    short, long = SubjectSpan("", "", 2, 3, 4), SubjectSpan("", "", 1, 4, 5)
    assert column_names(["each"], [short, long]) == ("-2", "-1", "+0", "+1", "+2")
    assert column_positions("-1", short, 8) == () and column_positions("-1", long, 8) == (2,)
    assert column_positions("all_subject", long, 8) == (1, 2, 3)
    assert column_positions("padding", short, 8) == (5, 6, 7)


@pytest.mark.parametrize(
    "settings",
    [
        dict(noise=0),
        dict(noise=-1),
        dict(noise=float("inf")),
        dict(noise_std=0),
        dict(window=0),
        dict(seeds=0),
        dict(tokens=()),
        dict(tokens=("first",)),
        dict(component="vae"),
        dict(batch_size=0),
        dict(unknown=1),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        CausalTracing(**settings)
    with pytest.raises(RequestError, match="'causal-trace' refuses"):
        registry.configure("locators", "causal-trace", settings)


@pytest.mark.parametrize(
    ("settings", "probes", "error", "message"),
    [
        (dict(), [("a cat", "dog")], SubjectNotFoundError, "dog"),
        (dict(), [], RequestError, "needs prompts"),
        (dict(kinds=("resnet",)), PROBES, UnsupportedModelError, "no such kind of part: resnet"),
        (dict(component="unet"), PROBES, UnsupportedModelError, "cannot judge a trace of 'unet'"),
        (dict(measure="colour"), PROBES, Exception, "no measure of that name"),
        (dict(measure_settings={"x": 1}), PROBES, RequestError, "refuses x"),
    ],
    ids=["subject", "no prompts", "kind", "measure", "unknown measure", "measure setting"],
)
def test_bad_input_is_refused_before_anything_runs(plain, settings, probes, error, message):
    with pytest.raises(error, match=message):
        run(plain, probes, **settings)


def test_a_backend_without_tracing_says_so():
    class Blind(Backend):
        name = "blind"

    Blind.__abstractmethods__ = frozenset()
    with pytest.raises(UnsupportedModelError, match="blind cannot be traced"):
        traceable(Blind(None))


def test_tiny_noise_removes_nothing(plain):
    with pytest.raises(NoCausalSiteError, match="did not remove the concept"):
        run(plain, noise_std=1e-6).best_state()
    raised = dataclasses.replace(run(plain), least_total_effect=99.0)
    with pytest.raises(NoCausalSiteError, match="at least 99"):
        raised.check_total_effect()
