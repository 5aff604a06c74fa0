"""`--expand`: other names on the command line, with the reason of each, and what was left out."""

from __future__ import annotations

import pytest

from diffedit import Edit


def test_other_names_are_reported_and_saved(cli, model):
    said = ("ablate", model, "dog", "--target", "cat", "--preserve", "dgo", "--expand", "all")
    outcome = cli(*said, "-o", "out", "--json")
    assert outcome.code == 0, outcome.err
    (request,) = outcome.document["edit"]["requests"]
    assert request["aliases"][0] == "dogs" and list(request["alias_reasons"]) == request["aliases"]
    assert request["alias_reasons"]["dogs"] == "plural" and request["alias_reasons"]["doog"].startswith("misspelt")
    assert len(outcome.document["notes"]) == 1 and "to be preserved" in outcome.document["notes"][0]
    assert list(Edit.load("out").requests[0].aliases) == request["aliases"]
    text = " ".join(cli(*said, "-o", "again").out.split())
    assert "and dogs (plural), " in text and "'dgo' is not edited with 'dog'" in text
    assert "dogs (plural)" in cli("show", "out").out
    shown = cli("show", "out", "--json").document["edit"]["requests"][0]
    assert shown == request


def test_update_and_plan_know_the_option(cli, model):
    made = cli("update", model, "dog", "boat", "--expand", "forms", "--alias", "hound", "-o", "out", "--json")
    assert made.document["edit"]["requests"][0]["alias_reasons"] == {"hound": "given", "dogs": "plural"}
    planned = cli("plan", model, "dog", "--target", "cat", "--preserve", "dogs", "--expand", "forms", "--json")
    assert planned.document["requests"][0]["aliases"] == [] and "'dogs'" in planned.document["notes"][0]
    assert "dogs (plural)" in cli("plan", model, "dog", "--target", "cat", "--expand", "forms").out


@pytest.mark.parametrize("command", ["ablate", "plan"])
def test_another_value_is_a_usage_error(cli, model, command):
    outcome = cli(command, model, "dog", "--expand", "some")
    assert outcome.code == 2 and "--expand" in outcome.err
