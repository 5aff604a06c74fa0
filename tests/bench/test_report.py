"""The pages say what the records hold, and the same records make the same pages."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from PIL import Image

from benchmarks.methods import report, tables
from benchmarks.methods.plan import BEST, DEFAULT, PARTS, Cell
from benchmarks.methods.table import available, describe
from benchmarks.methods.work import Folder


def record(cell: Cell, kept: int, lost: int = 10, **more):
    counts = [("efficacy", 10 - lost), ("generality", 10 - lost), ("near", kept), ("far", kept)]
    rows = [{"group": g, "name": g, "kind": g, "n": 10, "before": 10, "after": k, "kept": k} for g, k in counts]
    edit = {"seconds": 1.0, "bytes": 1000, "lora_bytes": 500, "folder_bytes": 5000, "rank": 1, "sites": 1, "target": []}
    return {
        "cell": asdict(cell),
        "label": describe(cell.setting),
        "refused": None,
        "rows": rows,
        "becomes": {"hits": 4, "n": 10},
        "fidelity_mmd": 0.5,
        "fidelity_clip": 0.9,
        "edit": edit,
        **more,
    }


def cell(method, concepts, role=DEFAULT, part="objects", setting=None):
    return Cell(part, role, concepts, "object", 10, 0, method, setting or {})


@pytest.fixture
def run(tmp_path):
    """A finished run of three methods: two concepts for the quick ones, one for the slow one."""
    folder = Folder(tmp_path / "run")
    found = []
    for name in ("fox", "bus"):
        found += [(cell("quickfix", (name,)), record(cell("quickfix", (name,)), 9))]
        found += [(cell("uce", (name,)), record(cell("uce", (name,)), 10, lost=2))]
        best = cell("uce", (name,), BEST, setting={"lam": 0.05})
        found += [(best, record(best, 10, lost=5))]
        found += [(cell("quickfix-mlp", (name,)), record(cell("quickfix-mlp", (name,)), 8))]
    slow = cell("esd", ("fox",))
    found += [(slow, record(slow, 3))]
    bad = cell("locoedit", ("fox",))
    found += [(bad, {"cell": asdict(bad), "label": "default", "refused": "NoCausalSiteError: none"})]
    fifty = cell("quickfix", tuple(f"c{i}" for i in range(50)), part="many")
    found += [(fifty, record(fifty, 9, lost=8))]
    price = {"seconds": 2.0, "ratio": 2.5, "ratio_bare": 20.0, "peak_bytes": 3_000_000, "machine": {
        "cpu": "x", "cores": 2, "threads": 1, "torch": "2"}}  # fmt: skip
    cost = cell("uce", ("fox",), part="cost")
    found += [(cost, record(cost, 0) | price)]
    tuned = [cell("uce", ("dog",), "tuning", "tuning", setting) for setting in ({}, {"lam": 0.05})]
    found += [(one, record(one, 8, lost=9 if one.setting else 1)) for one in tuned]
    for one, made in found:
        folder.finish(one, made)
    strips = tmp_path / "run" / "strips"
    strips.mkdir()
    for name in ("unedited", "quickfix", "uce"):
        Image.new("RGB", (50, 10), "red").save(strips / f"objects-fox-{name}.png")
    return folder, [one for one, _ in found]


def test_pages_from_a_run_and_again_from_the_published_json_alone(run, tmp_path):
    folder, cells = run
    out = tmp_path / "docs"
    (out / "methods").mkdir(parents=True)
    (out / "methods" / "index.md").write_text(f"# Which\n\n{report.BEGIN}\nstale numbers\n{report.END}\n\nend\n")
    missing = cell("time", ("fox",))
    report.publish(folder, [*cells, missing], {"uce": {"lam": 0.05}, "quickfix": {}}, out)
    report.write(out)
    text = (out / "results" / "methods.md").read_text()
    index = (out / "methods" / "index.md").read_text()
    assert "The part *objects* is not complete; cells missing: 1." in text
    assert "| 1 concept | `quickfix` | near kept | 95% | 90.0% (68 to 99) | **no** |" in text
    assert "| 50 concepts at once | `quickfix` | efficacy | 90% | 80.0% (44 to 97) | **no** |" in text
    assert "- **near kept** (90% for `quickfix`): better is `uce` (default, 100%), `uce` (best, 100%)." in text
    assert "| `uce` | best: lam=0.05 | 2 | 50.0%" in text
    assert "| `quickfix` | default, the best | 2 | 100.0%" in text
    assert "`locoedit` (default) refused 1 of 1 edits, such as fox: NoCausalSiteError: none" in text
    assert "measured on (fox)" in text
    assert "| fox |  | 10 of 10 | 10 of 10 | 9 of 10 | 9 of 10 | near, far |" in text
    own, _, of_parts = text.partition("### The parts of `quickfix`, objects")
    assert "`quickfix-mlp`" not in own
    assert "| `quickfix-mlp` | edits the first layer's MLP instead | 2 | 100.0%" in of_parts
    assert "| `quickfix` | as it is | 2 | 100.0%" in of_parts
    assert "| `uce` | default | 2.00 | 2.5 | 20.0 | 3.0 | 1,000 | 500 |" in text
    assert "| `uce` | lam=0.05 | 90.0%" in text
    assert "stale" not in index
    assert index.startswith("# Which")
    assert index.endswith("end\n")
    assert "| [`uce`](uce.md) | 50% | 100% | 100% |" in index
    with Image.open(out / "results" / "methods" / "pareto-objects.png") as image:
        assert image.width > 500
    assert (out / "results" / "methods" / "pictures-objects.png").is_file()
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    report.write(out)
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before


def test_facts_have_a_section_once_they_are_measured(run, tmp_path):
    folder, cells = run
    out = tmp_path / "docs"
    (out / "methods").mkdir(parents=True)
    (out / "methods" / "index.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    report.publish(folder, cells, {}, out)
    report.write(out)
    text, index = ((out / page).read_text() for page in ("results/methods.md", "methods/index.md"))
    assert "## Facts" not in text and "facts: gone" in index
    fact = replace(cell("quickfix", ("mascot of rome",), part="facts"), kind="fact")
    folder.finish(fact, record(fact, 9))
    report.publish(folder, [*cells, fact], {}, out)
    report.write(out)
    text, index = ((out / page).read_text() for page in ("results/methods.md", "methods/index.md"))
    assert "## Facts" in text
    assert "| mascot of rome |  | 10 of 10 |" in text and "facts: gone" in index
    assert (out / "results" / "methods" / "pareto-facts.png").is_file()


def test_without_a_run_the_pages_say_so(tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "index.md").write_text(f"{report.BEGIN}\nstale numbers\n{report.END}\n")
    report.write(tmp_path)
    assert report.NOTHING in (tmp_path / "results" / "methods.md").read_text()
    assert report.NOTHING in (tmp_path / "methods" / "index.md").read_text()


def test_published_json_is_one_record_a_line_and_nothing_of_the_machine(run, tmp_path):
    folder, cells = run
    report.publish(folder, cells, {}, tmp_path)
    data = (tmp_path / "results" / "methods" / "objects.json").read_text()
    assert len(json.loads(data)["records"]) == 10
    assert str(tmp_path) not in data
    assert not (tmp_path / "results" / "methods" / "styles.json").exists()
    assert {path.stem for path in (tmp_path / "results" / "methods").glob("*.json")} <= set(PARTS)


def test_methods_that_do_better_on_the_same_concepts_are_named():
    records = [record(cell("quickfix", (name,)), 9) for name in ("fox", "bus")]
    records += [record(cell("uce", ("fox",)), 10), record(cell("esd", ("fox",)), 9)]
    said = tables.rivals(records)
    assert said[2] == "- **near kept** (90% for `quickfix`): better is `uce` (default, 100%)."
    assert said[0].endswith("better is none.")


def test_every_method_has_a_page():
    docs = report.ROOT / "docs" / "methods"
    for name, method in available().items():
        assert (docs / f"{report._PAGES.get(method.updater, method.updater)}.md").is_file(), name
        assert f"`{method.updater}`" in (docs / "index.md").read_text(encoding="utf-8"), name
