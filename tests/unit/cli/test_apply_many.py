"""`diffedit apply` over many models, and the lists that it takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from diffedit.cli.lists import spread


@pytest.fixture
def edits(cli, model):
    for name in ("dog", "pig"):
        assert cli("ablate", model, name, "--target", "cat", "-o", f"no-{name}").code == 0
    return ["no-dog", "no-pig"]


@pytest.fixture
def models(model):
    return [shutil.copytree(model, Path(name)) for name in ("one", "two")]


def test_lists_of_edits_and_models(cli, edits, models):
    outcome = cli("apply", "--edits", *edits, "--models", *models, "-o", "out", "--json")
    assert outcome.code == 0, outcome.err
    document = outcome.document
    assert (document["written"], document["kept"], document["failed"]) == (2, 0, 0)
    assert [entry["model"] for entry in document["models"]] == ["one", "two"]
    assert [entry["id"] for entry in document["edits"]] and len(document["edits"]) == 2
    assert (Path("out") / "two" / "model_index.json").is_file()
    again = cli("apply", "--models", *models, "--edits", *edits, "-o", "out")
    assert again.code == 0 and again.out.count("kept") == 3 and "2 kept" in again.out


def test_a_model_that_fails_is_in_the_table_and_the_exit_code_is_1(cli, edits, models):
    outcome = cli("apply", "--edit", edits[0], "--models", models[0], "no-such-model", models[1], "-o", "out")
    assert outcome.code == 1
    assert "no-such-model" in outcome.out and "DE-201" in outcome.out and "2 written, 1 failed" in outcome.out
    assert "2/3 failed no-such-model" in outcome.err
    document = cli("apply", "--edit", edits[0], "--models", "no-such-model", "-o", "out", "--json").document
    assert document["failed"] == 1 and document["models"][0]["code"] == "DE-201"


def test_one_model_is_applied_to_as_ever(cli, model, edits):
    outcome = cli("apply", "--edit", edits[0], model, "--edit", edits[1], "-o", "out", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document["folder"] == "out" and len(outcome.document["edits"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--edits", "no-dog", "-o", "out"], "DE-100"),
        (["one", "--edits", "no-dog", "--models", "two", "-o", "out"], "DE-100"),
        (["--models", "one", "-o", "out"], "USAGE"),
        (["--edits", "no-dog", "--models", "one", "./one", "-o", "out"], "DE-100"),
        (["--edits", "missing", "--models", "one", "-o", "out"], "DE-505"),
        (["--edits", "no-dog", "--models", "one", "-o", "."], "DE-100"),
    ],
)
def test_bad_usage(cli, edits, models, arguments, code):
    outcome = cli("apply", *arguments, "--json")
    assert outcome.code != 0 and outcome.error["code"] == code, outcome.out
    assert not Path("out").exists()


def test_lists_end_where_the_next_option_begins():
    assert spread(["m", "--edit", "a", "b", "--edits", "c", "d", "-o", "x", "y"]) == (
        ["m", "--edit", "a", "b", "--edits", "c", "--edits", "d", "-o", "x", "y"]
    )
    assert spread(["--models", "a", "--", "--models", "b", "c"]) == ["--models", "a", "--", "--models", "b", "c"]
    assert spread(["--models"]) == ["--models"]
