"""A plan says what the edit will be: within bounds where it cannot be exact, and exact where it can."""

from __future__ import annotations

import gc

import pytest
import torch
from pydantic import ValidationError

from diffedit import Editor, QuickFix, planning
from diffedit.delta import Delta
from diffedit.errors import NoOpError, RequestError, UnsupportedModelError
from diffedit.garbage import postponed
from diffedit.growth import count_prompts
from diffedit.interfaces import Updater
from diffedit.locators.causal_trace import CausalTracing
from diffedit.locators.fixed import FixedLocator
from diffedit.metering import TensorMeter, extrapolate, peak_bytes
from diffedit.planning import part_of
from diffedit.request import make_request
from diffedit.site import Role
from diffedit.testing import model_state

WORDS = [a + b + c for a in "dcpt" for b in "aeiou" for c in "bglnrst"]


@pytest.fixture
def editor(sd1):
    return Editor(sd1)


def compare(editor, subjects, **said):
    """A plan and the edit that it was made for."""
    plan = editor.plan(subjects, **said)
    edit = editor.ablate(subjects, **said)
    return plan, edit


@pytest.mark.parametrize("preserve", [[], ["fox", "owl"]], ids=["plain", "preserving"])
def test_a_small_plan_is_exact(editor, preserve):
    plan, edit = compare(editor, "dog", preserve=preserve)
    assert plan.requests == edit.requests and plan.target_reasons == edit.manifest.target_reasons
    assert plan.prompts == plan.sampled == count_prompts(edit.requests)
    assert plan.pairs == sum(record.diagnostics["pairs"] for record in edit.manifest.sites)
    assert [(site.name, site.rank) for site in plan.sites] == [
        (record.site.name, record.rank) for record in edit.manifest.sites
    ]
    assert plan.files == {name: len(data) for name, data in edit.files().items()}
    assert plan.bytes == sum(plan.files.values())
    assert plan.seconds > 0 and plan.memory > 0 and plan.choosing_seconds > 0


@pytest.mark.parametrize(
    "said",
    [
        {"preserve": []},
        {"preserve": WORDS[-30:]},
        {"preserve": [], "locator": FixedLocator(role=Role.TEXT_MLP_OUT, layer=1)},
        {"preserve": [], "updater": QuickFix(pair_tol=0), "templates": ["{}", "a photo of {}"]},
    ],
    ids=["plain", "preserving", "another site", "all pairs"],
)
def test_a_large_plan_is_near_and_within_its_bounds(editor, said, monkeypatch):
    monkeypatch.setattr(planning, "BUDGET", 1e-9)  # as on a slow machine: three small parts have to do
    plan, edit = compare(editor, WORDS[:40], target="cat", **said)
    assert plan.sampled < plan.prompts == count_prompts(edit.requests)
    (site,), (record,) = plan.sites, edit.manifest.sites
    assert record.rank <= site.rank_bound <= min(site.d_in, site.d_out)
    assert record.rank / 2 <= site.rank <= site.rank_bound
    assert plan.pairs / 2 <= record.diagnostics["pairs"] <= plan.pairs * 2
    actual = {name: len(data) for name, data in edit.files().items()}
    assert plan.files.keys() == actual.keys()
    assert plan.bytes / 2 <= sum(actual.values()) <= plan.bytes * 2
    assert 0 < plan.seconds < 600 and 0 < plan.memory < 1 << 30


def test_a_plan_changes_nothing(editor, sd1):
    first = editor.ablate("fox", target="owl")
    before, random = model_state(sd1), torch.get_rng_state()
    editor.plan(["dog", "pig"], preserve=["fox"])
    assert model_state(sd1) == before and torch.equal(torch.get_rng_state(), random)
    assert editor.edits == (first,)


def test_a_plan_does_not_depend_on_what_is_in_the_model(editor):
    plain = editor.plan("dog", target="cat", preserve=["fox"])
    editor.ablate("dog", target="owl")
    volatile = {"seconds", "choosing_seconds"}
    again = editor.plan("dog", target="cat", preserve=["fox"])
    assert plain.model_dump(exclude=volatile) == again.model_dump(exclude=volatile)


def test_a_plan_is_frozen_and_says_so_in_words(editor):
    plan = editor.plan("dog", target="cat")
    with pytest.raises(ValidationError):
        plan.prompts = 3
    text = plan.summary()
    for part in ("ablate 'dog' -> 'cat' (given)", "out_proj [32 x 32]: rank", "pairs", "above the model", "files"):
        assert part in text
    assert type(plan).model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ({"subject": []}, RequestError, "there is no subject"),
        ({"subject": ["dog", "Dog"]}, RequestError, "given twice"),
        ({"subject": "dog", "target": "cat", "templates": ["x"]}, RequestError, "exactly one"),
        ({"subject": "dog", "locator": "locogen"}, RequestError, "not known before they are measured: locator locogen"),
        ({"subject": "dog", "locator": CausalTracing()}, RequestError, "not known before they are measured"),
        ({"subject": "dog", "target": "cat", "locator": FixedLocator(layer=9)}, UnsupportedModelError, "layer 9"),
    ],
)
def test_bad_input_is_refused(editor, said, error, message):
    with pytest.raises(error, match=message):
        editor.plan(**said)


def test_what_ablate_would_refuse_is_refused(editor, sd1):
    with torch.no_grad():
        for parameter in sd1.text_encoder.parameters():
            parameter.zero_()
    with pytest.raises(NoOpError):
        editor.plan("dog", target="cat", templates=["{}"])


class Trainer(QuickFix):
    """Something that cannot be tried in part."""

    name = "trainer"
    solve_pairs = Updater.solve_pairs

    def solve(self, backend, requests, location) -> Delta:
        raise AssertionError("a plan must not train")


def test_what_trains_has_no_estimates(editor):
    plan = editor.plan("dog", target="cat", updater=Trainer())
    assert (plan.seconds, plan.memory, plan.pairs, plan.bytes, plan.sampled) == (None, None, None, None, 0)
    assert plan.sites[0].rank is None and plan.sites[0].rank_bound == 32
    assert "trainer does not solve" in plan.notes[0] and plan.notes[0] in plan.summary()


def test_parts_are_even_selections():
    requests = [make_request(subject=word, target="cat", preserve=("fox", "owl", "elk", "emu")) for word in WORDS[:10]]
    assert part_of(requests, 1.0) == tuple(requests)
    part = part_of(requests, 0.3, least=2)
    assert len(part) == 3 and all(len(request.preserve) == 2 for request in part)
    assert len(part_of(requests, 0.01, least=2)) == 2
    templates = len(requests[0].templates)
    assert count_prompts(requests) == templates * (10 * 2 + 4)


def test_the_meter_counts_what_is_alive_at_once():
    kept = torch.zeros(1000)

    def work():
        a = torch.ones(1000)  # 4,000 bytes
        b = a + 1  # 8,000
        view = b[:10]
        del a, b
        kept.add_(1)  # somebody else's
        del view
        gc.collect()
        torch.ones(2000, dtype=torch.float64)  # 16,000 alone

    assert peak_bytes(work) == 16_000
    with TensorMeter() as meter:
        x = torch.ones(10)
        y = kept[:5]
    assert meter.live == meter.peak == 40 and x is not y


def test_costs_are_fitted_without_negative_parts():
    quadratic = [(1.0, n, n * n) for n in (1, 4, 16, 64)]
    values = [2 + 3 * n + 0.5 * n * n for n in (1, 4, 16, 64)]
    assert extrapolate(quadratic, values, (1.0, 100, 10_000)) == pytest.approx(5302, rel=1e-6)
    noisy = extrapolate([(1.0, n) for n in (1, 2, 4)], [5.0, 5.1, 4.9], (1.0, 100))
    assert 4.9 <= noisy <= 20


def test_the_reading_alone_is_metered_apart(editor, monkeypatch):
    """What follows the solve is another phase; functions around it are decorated like the reading is."""
    big = 1 << 24
    held = []

    def describe(*given, describe=planning.describe):
        held.append(torch.zeros(big, dtype=torch.uint8))
        return describe(*given)

    ready = planning.prepare(
        editor.backend, editor._complete, [make_request(subject="dog", target="cat")], QuickFix(), FixedLocator()
    )
    monkeypatch.setattr(planning, "describe", postponed()(describe))
    peaks = planning._measured(editor.backend, editor.ledger, ready, ready.requests).memory
    assert 0 < peaks.reading < big <= peaks.finishing and 0 < peaks.solving < big
