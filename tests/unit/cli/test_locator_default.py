"""Without `--locator` the updater's own locator is used, and `--set locator.KEY=VALUE` reaches it."""

from __future__ import annotations


def test_the_updaters_own_locator(cli, model):
    outcome = cli(
        *("ablate", model, "dog", "--target", "cat", "--updater", "uce", "-o", "out", "--json"),
        *("--set", "locator.keys=false", "--set", "lam=0.25", "--set", "prompts=expanded"),
    )
    assert outcome.code == 0, outcome.err
    edit = outcome.document["edit"]
    assert edit["locator"]["name"] == "cross-attention" and edit["locator"]["settings"]["keys"] is False
    assert edit["updater"]["settings"]["lam"] == 0.25 and edit["updater"]["settings"]["prompts"] == "expanded"
    assert len(edit["sites"]) == 4 and all("attn2.to_v" in str(site) for site in edit["sites"])


def test_a_named_locator_wins(cli, model):
    outcome = cli("ablate", model, "dog", "--target", "cat", "--updater", "uce", "--locator", "fixed", "--json")
    assert outcome.code != 0 and "cannot edit these sites" in str(outcome.error)
