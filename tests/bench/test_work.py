"""Cells: never made twice, never half made, and taken by others when their process dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks.methods.concepts import FACTS
from benchmarks.methods.plan import BEFORE, BEST, DEFAULT, PARTS, Cell, Size, best, cells, estimate
from benchmarks.methods.table import METHODS, Method, available, describe
from benchmarks.methods.work import Folder, work

ROOT = Path(__file__).parents[2]
LIST = [Cell("objects", DEFAULT, (name,), "object", 2, 0, "quickfix") for name in ("a", "b", "c", "d")]
PROGRAM = textwrap.dedent(
    """
    import pathlib, sys, time
    from benchmarks.methods.plan import Cell
    from benchmarks.methods.work import Folder, work
    cells = [Cell("objects", "default", (name,), "object", 2, 0, "quickfix") for name in "abcd"]
    path, pause = pathlib.Path(sys.argv[1]), float(sys.argv[2])

    def run(cell):
        with open(path / "started", "a") as log:
            log.write(cell.concepts[0])
        time.sleep(pause)
        return {"made": cell.concepts[0]}

    work(Folder(path), lambda done: cells, run, wait=0.02)
    """
)


def start(path: Path, pause: float) -> subprocess.Popen[bytes]:
    path.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(path), str(pause)], cwd=ROOT)


def started(path: Path) -> str:
    file = path / "started"
    return file.read_text() if file.is_file() else ""


def wait_for(path: Path, count: int) -> None:
    end = time.monotonic() + 60
    while len(started(path)) < count:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_rerun_does_only_what_is_missing(tmp_path):
    made = []

    def run(cell):
        made.append(cell.concepts[0])
        return {"made": cell.concepts[0]}

    folder = Folder(tmp_path)
    assert work(folder, lambda done: LIST[:2], run) == []
    assert work(Folder(tmp_path), lambda done: LIST, run) == []
    assert made == ["a", "b", "c", "d"]
    assert sorted(record["made"] for record in Folder(tmp_path).records().values()) == made


def test_a_cell_that_another_process_holds_is_left_to_it(tmp_path):
    folder = Folder(tmp_path)
    with folder.claim(LIST[0]) as mine:
        assert mine
        with Folder(tmp_path).claim(LIST[0]) as theirs:
            assert not theirs
        with Folder(tmp_path).claim(LIST[1]) as other:
            assert other
    with Folder(tmp_path).claim(LIST[0]) as theirs:
        assert theirs
    folder.finish(LIST[0], {})
    with Folder(tmp_path).claim(LIST[0]) as done:
        assert not done


def test_one_failing_cell_costs_no_other(tmp_path):
    def run(cell):
        if cell.concepts == ("b",):
            raise RuntimeError("no")
        return {}

    failed = work(Folder(tmp_path), lambda done: LIST, run)
    assert [(cell.concepts, str(error)) for cell, error in failed] == [(("b",), "no")]
    assert [Folder(tmp_path).finished(cell) for cell in LIST] == [True, False, True, True]
    assert work(Folder(tmp_path), lambda done: LIST, lambda cell: {}) == []


def test_cells_that_appear_later_are_done_too(tmp_path):
    order = []

    def run(cell):
        order.append(cell.concepts[0])
        return {}

    work(Folder(tmp_path), lambda done: LIST[: 1 + len(done)], run)
    assert order == ["a", "b", "c", "d"]


def test_two_processes_share_the_cells(tmp_path):
    both = [start(tmp_path, 0.3), start(tmp_path, 0.3)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert sorted(started(tmp_path)) == list("abcd")
    assert len(Folder(tmp_path).records()) == 4


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX")
def test_what_a_killed_process_held_is_done_by_another(tmp_path):
    victim = start(tmp_path, 60)
    wait_for(tmp_path, 1)
    other = start(tmp_path, 0.01)
    wait_for(tmp_path, 4)  # all but the victim's; now it waits for that one
    assert other.poll() is None
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait(60)
    assert other.wait(60) == 0
    assert sorted(started(tmp_path)) == sorted("aabcd")
    assert len(Folder(tmp_path).records()) == 4
    assert not [path for path in (tmp_path / "cells").iterdir() if path.suffix != ".json"]


def test_a_cells_name_changes_with_everything_it_depends_on():
    base = Cell("objects", DEFAULT, ("fox",), "object", 6, 1, "quickfix", {"lam": 0.1})
    others = [
        Cell("objects", DEFAULT, ("fox",), "object", 7, 1, "quickfix", {"lam": 0.1}),
        Cell("objects", DEFAULT, ("fox",), "object", 6, 2, "quickfix", {"lam": 0.1}),
        Cell("objects", DEFAULT, ("fox",), "object", 6, 1, "quickfix", {"lam": 0.2}),
        Cell("objects", DEFAULT, ("fox",), "style", 6, 1, "quickfix", {"lam": 0.1}),
        Cell("objects", BEST, ("fox",), "object", 6, 1, "quickfix", {"lam": 0.1}),
    ]
    assert len({cell.key for cell in [base, *others]}) == 6
    again = Cell("objects", DEFAULT, ("fox",), "object", 6, 1, "quickfix", dict(lam=0.1))
    assert base.key == again.key


def test_published_records_stay_valid_and_facts_have_cells_of_their_own():
    """A cell's name that changes makes a night's work again."""
    own = cells(available(), ("pixel",), Size(), PARTS, {})
    keys = {cell.key for cell in own if cell.part != "facts"}
    assert "objects-default-quickfix-fox-333bcda76d" in keys
    facts = [cell for cell in own if cell.part == "facts"]
    assert {cell.kind for cell in facts} == {"fact"}
    assert len([cell for cell in facts if cell.method == "quickfix"]) == len(FACTS)
    assert len([cell for cell in facts if cell.method == "esd"]) == Size().slow_others


TWO = {
    "quick": Method("quickfix", ({}, {"lam": 1.0}, {"lam": 2.0})),
    "slow": Method("esd", ({},), many=False, seconds=99),
}
SMALL = Size(images=2, concepts=3, slow_concepts=2, slow_others=1, tuning_images=1, tuning_concepts=1, counts=(5,))


def planned(parts, done=None):
    return cells(TWO, ("pixel", "sepia"), SMALL, parts, done or {})


def rows(kept, before=10):
    """Records of which half the subjects' pictures are kept and `kept` of the others'."""
    counts = [("efficacy", 0), ("generality", 0), ("near", kept), ("far", kept)]
    return {
        "refused": None,
        "rows": [
            {"group": g, "name": g, "kind": g, "n": before, "before": before, "after": k, "kept": k} for g, k in counts
        ],
    }


def test_slow_methods_are_measured_on_fewer_concepts_and_one_by_one():
    found = planned(("objects", "styles", "many"))
    assert [c.concepts[0] for c in found if c.part == "objects" and c.method == "quick"] == ["fox", "banana", "castle"]
    assert [c.concepts[0] for c in found if c.part == "objects" and c.method == "slow"] == ["fox", "banana"]
    assert [c.concepts for c in found if c.part == "styles" and c.method == "slow"] == [("pixel",)]
    assert [(c.method, len(c.concepts)) for c in found if c.part == "many" and c.method] == [("quick", 5)]
    assert all(estimate(c, TWO.get(c.method)) > 0 for c in found)


def test_every_measured_cell_has_its_unedited_pictures_before_it():
    found = planned(("tuning", "objects", "styles", "colours", "many"))
    for i, cell in enumerate(found):
        if cell.role != BEFORE:
            assert any(c.role == BEFORE and c.ground == cell.ground for c in found[:i]), cell


def test_tuning_and_measuring_share_neither_concepts_nor_seeds():
    found = planned(("tuning", "objects", "styles", "colours", "many"))
    used = {
        tuned: {(name, seed) for c in found if (c.part == "tuning") is tuned for name in c.concepts for seed in
                range(c.seed, c.seed + c.images)}
        for tuned in (True, False)
    }  # fmt: skip
    assert not {name for name, _ in used[True]} & {name for name, _ in used[False]}
    assert not {seed for _, seed in used[True]} & {seed for _, seed in used[False]}


def test_the_best_setting_follows_from_tuning_and_adds_cells():
    tuning = [cell for cell in planned(("tuning",)) if cell.method == "quick"]
    assert best("quick", TWO["quick"], SMALL, {}) is None
    assert not [cell for cell in planned(("objects",)) if cell.role == BEST]
    done = {cell.key: rows(9 if cell.setting == {"lam": 2.0} else 5) for cell in tuning}
    assert best("quick", TWO["quick"], SMALL, done) == {"lam": 2.0}
    extra = [cell for cell in planned(("objects",), done) if cell.role == BEST]
    assert {(cell.method, cell.setting["lam"]) for cell in extra} == {("quick", 2.0)}
    assert len(extra) == 3
    equal = {cell.key: rows(7) for cell in tuning}
    assert best("quick", TWO["quick"], SMALL, equal) == {}
    refused = {cell.key: rows(7) if cell.setting else {"refused": "why", "rows": []} for cell in tuning}
    assert best("quick", TWO["quick"], SMALL, refused) == {"lam": 1.0}


def test_every_method_of_the_table_can_be_built_and_starts_its_grid_with_the_default():
    found = available()
    assert {"quickfix", "uce", "esd", "concept-ablation", "finetune-text-encoder"} <= set(found)
    for name, method in found.items():
        for setting in method.grid:
            updater, locator = method.build(setting)
            assert updater.name == method.updater
            assert (locator is None) == ("locator" not in setting)
            assert json.loads(json.dumps(setting)) == setting, name
            assert describe(setting)
            method.build({**setting, **method.brief})
    assert METHODS["quickfix"].grid[0] == METHODS["esd"].grid[0] == {}
