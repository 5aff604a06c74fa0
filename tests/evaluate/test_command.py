"""`diffedit evaluate` on a tiny random model: nothing scripted, so the detector refuses, and that is a result too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffedit import Edit, Editor, verify
from diffedit.cli import app
from diffedit.evaluate.gallery import Gallery, draw
from diffedit.evaluate.suite import Job
from tests.launch import launched

FAST = ("--images", "2", "--steps", "1", "--scorer", "builtin:emoji-scorer")


@pytest.fixture
def cli(tmp_path, monkeypatch, edit):
    monkeypatch.chdir(tmp_path)
    edit.save("no-dog")

    def run(*args):
        result = CliRunner().invoke(app, ["evaluate", *map(str, args)])
        return result.exit_code, result.stdout, result.stderr

    return run


def test_the_command_writes_the_report_and_says_what_it_found(cli, model):
    code, out, err = cli(model, "--edit", "no-dog", *FAST, "-o", "found", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["command"] == "evaluate" and document["passed"] and document["requirements"] == []
    names = [found["name"] for found in document["evaluation"]["findings"]]
    assert names[:4] == ["efficacy", "generality", "specificity_near", "specificity_far"]
    assert document["evaluation"]["pictures"] == 10
    assert Path(document["report"]).is_file() and Path("found/evaluation.json").is_file()
    assert len(list(Path("found").rglob("*.png"))) == 20


def test_requirements_decide_the_exit_code_and_the_card_is_written(cli, model):
    base = (model, "--edit", "no-dog", *FAST, "-o", "found", "--overwrite")
    code, out, _ = cli(*base, "--require", "fidelity_mmd<=1000", "--write-card", "--json")
    assert code == 0 and json.loads(out)["passed"]
    card = Path("no-dog/README.md").read_text(encoding="utf-8")
    assert "fidelity mmd" in card and "Judged by builtin:emoji-scorer" in card.replace("\\", "")
    measured = Edit.load("no-dog").measured
    assert measured is not None and "fidelity mmd" in {metric.name for metric in measured.metrics}
    again = Edit.load("no-dog").save("again")
    assert (again / "README.md").read_text(encoding="utf-8") == card, "saving it again keeps the numbers"
    assert verify("no-dog").ok and not [c for c in verify("no-dog").checks if c.outcome == "changed"]
    code, out, _ = cli(*base, "--require", "fidelity_mmd<=1000", "--require", "efficacy>=0.5", "--json")
    assert code == 1
    document = json.loads(out)
    assert [verdict["met"] for verdict in document["requirements"]] == [True, False]
    assert "does not see 'dog'" in document["requirements"][1]["reason"]
    assert ">missed<" in Path("found/report.html").read_text(encoding="utf-8")
    code, out, _ = cli(*base, "--require", "efficacy>=0.5")
    assert code == 1 and "missed" in out and "refused" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--require", "efficiency>=1"), "efficacy"),
        (("--require", "efficacy"), "NAME>=NUMBER"),
        (("--near", "dog"), "edited itself"),
        (("--everyday", "missing.txt"), "cannot be read"),
        (("--images", "0"), "--images"),
    ],
)
def test_wrong_input_is_told_before_anything_is_drawn(cli, model, args, words):
    code, _, err = (
        cli(model, "--edit", "no-dog", *FAST, *args) if args[0] != "--images" else cli(model, "--edit", "no-dog", *args)
    )
    assert code == 2 and words in " ".join(err.split())
    assert not Path("evaluation").exists()


def test_a_card_needs_a_folder(cli, model):
    code, _, err = cli(model, "--edit", "me/no-dog", *FAST, "--write-card")
    assert code == 2 and "pull the edit first" in err.lower().replace("\n", " ")


def test_everyday_prompts_come_from_a_file(cli, model):
    Path("mine.txt").write_text("# mine\na boat\n\na tree at night\n", encoding="utf-8")
    code, _, err = cli(model, "--edit", "no-dog", *FAST, "--everyday", "mine.txt", "-o", "found")
    assert code == 0, err
    content = json.loads(Path("found/evaluation.json").read_text(encoding="utf-8"))
    assert [p["prompt"] for p in content["pictures"] if p["group"] == "everyday"] == ["a boat", "a tree at night"]


def test_a_model_without_a_judge(cli, model):
    code, _, err = cli(model, "--edit", "no-dog")
    assert code == 2 and "--scorer" in err


@pytest.mark.slow
def test_two_processes_find_what_one_finds(cli, model, tmp_path):
    arguments = ["evaluate", str(model), "--edit", "no-dog", *FAST, "--batch-size", "2", "--json"]
    code, one, err = cli(*arguments[1:], "-o", "one")
    assert code == 0, err
    done = launched([*arguments, "-o", "two"], tmp_path, 2)
    assert done.returncode == 0, done.stderr[-2000:]
    found, alone = (json.loads(text)["evaluation"] for text in (done.stdout, one))  # exactly one document each
    assert found == alone
    names = [sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.png")) for folder in ("one", "two")]
    assert names[0] == names[1] and len(names[0]) == 20
    assert all(Path("one", name).read_bytes() == Path("two", name).read_bytes() for name in names[0])
    assert Path("two/report.html").read_bytes() == Path("one/report.html").read_bytes()
    again = launched([*arguments, "-o", "two"], tmp_path, 2)
    assert again.returncode != 0 and "already there" in again.stdout + again.stderr


def test_pictures_in_memory_are_drawn_by_every_process(model, edit, monkeypatch):
    """Nobody else sees them, so nothing may be left to the others; the launcher says there are two."""
    editor = Editor(model)
    job = Job("efficacy", "dog", "edit", "object", "a dog", 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    memory = Gallery(None)
    counts = []
    sampling = {"steps": 1, "guidance": 1.0}
    names = draw(editor, [job, replace(job, seed=1)], "before", "weights", memory, sampling, 1, counts.append)
    assert all(memory.has(name) for name in names) and sum(counts) == 2
