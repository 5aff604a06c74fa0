"""Cells on the bundled model, with few denoising steps: what the other tests take from scripts happens for real."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.methods.cost import runner
from benchmarks.methods.measure import World
from benchmarks.methods.plan import BEFORE, DEFAULT, Cell
from benchmarks.methods.pool import pooled
from benchmarks.methods.table import available
from diffedit.evaluate.gallery import weights_of
from diffedit.interfaces import Sampling


def quick(editor):
    own = editor.backend.model
    editor.backend.model = replace(own, sampling=Sampling(3, own.sampling.guidance, own.sampling.pixels))


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    quick(made.editor)
    return made


def pictures(world):
    return sorted((world.folder / "unedited").rglob("*.png"))


def test_a_cell_leaves_counts_and_the_model_as_it_was(world):
    weights = weights_of(world.editor)
    before = Cell("objects", BEFORE, ("fox",), "object", 2, 7)
    cell = replace(before, role=DEFAULT, method="quickfix-bare")
    assert world.run(before)["pictures"] == 10
    drawn = {path: path.stat().st_mtime_ns for path in pictures(world)}
    assert len(drawn) == 10
    record = world.run(cell)
    assert {path: path.stat().st_mtime_ns for path in pictures(world)} == drawn
    assert record == world.run(cell) | {"edit": record["edit"]}
    assert record["refused"] is None
    assert record["edit"]["target"] == ["animal"]
    assert record["edit"]["lora_bytes"] < record["edit"]["folder_bytes"]
    assert sum(row["n"] for row in record["rows"]) == 8
    assert {row["group"] for row in record["rows"]} == {"efficacy", "generality", "near", "far"}
    assert weights_of(world.editor) == weights
    assert len(list((world.folder / "strips").glob("objects-fox-*.png"))) == 2
    idle = {"everyday": 0, "give_up": None, "lam": 1e6}  # an edit that does next to nothing keeps everything
    weak = world.run(replace(cell, method="quickfix-paper", setting=idle))
    for name, want in (("specificity_near", 1.0), ("specificity_far", 1.0), ("efficacy", 0.0)):
        found = pooled(name, [weak])
        assert found.value in (want, None), name
    assert weak["fidelity_mmd"] == pytest.approx(0.0, abs=1e-3)


def test_an_edit_that_is_refused_is_a_result(world):
    setting = {"locator": {"name": "cross-attention", "first": 90}}
    record = world.run(Cell("objects", DEFAULT, ("fox",), "object", 1, 7, "uce", setting))
    assert record["refused"].startswith("UnsupportedModelError: ")
    assert "rows" not in record
    assert not world.editor.edits


def test_facts_are_measured_on_their_own_model_and_nothing_else_is(world):
    plain, weights = world.editor, weights_of(world.editor)
    before = Cell("facts", BEFORE, ("mascot of rome",), "fact", 2, 7)
    world.use(before)
    quick(world.editor)
    assert world.editor.backend.model.source == "builtin:emoji-facts"
    assert world.run(before)["pictures"] == 10
    record = world.run(replace(before, role=DEFAULT, method="quickfix"))
    assert record["refused"] is None and record["edit"]["target"] == ["tiger"]
    near = [row["name"] for row in record["rows"] if row["group"] == "near"]
    assert near[0] == "dish of rome" and all(" of " in name for name in near)
    assert len(list((world.folder / "strips").glob("facts-mascot-of-rome-*.png"))) == 2
    world.run(Cell("objects", BEFORE, ("fox",), "object", 1, 7))
    assert world.editor is plain and weights_of(plain) == weights


def test_cost_is_measured_beside_quickfix(world):
    record = runner(world)(Cell("cost", DEFAULT, ("fox",), "object", 0, 0, "quickfix-published"))
    assert record["seconds"] > 0
    assert record["ratio"] == pytest.approx(record["seconds"] / record["quickfix_seconds"])
    assert 10_000 < record["peak_bytes"] < 1e9
    assert not world.editor.edits


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["object", "style", "colour", "fact", "many"])
def test_every_method_makes_a_cell_of_every_kind(world, kind):
    concepts = {
        "object": ("bus",),
        "style": ("pixel",),
        "colour": ("red",),
        "fact": ("dish of rome",),
        "many": ("bus", "fox", "key"),
    }[kind]
    for name, method in available().items():
        if kind == "many" and not method.many:
            continue
        what = "object" if kind == "many" else kind
        cell = Cell("objects", DEFAULT, concepts, what, 2, 7, name, dict(method.brief))
        record = world.run(cell)
        refused = record["refused"]
        assert refused is None or "NoCausalSiteError" in refused, (name, refused)
        assert refused or record["pictures"] >= 8, name
        assert not world.editor.edits, name
