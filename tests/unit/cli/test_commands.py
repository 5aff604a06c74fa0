"""Every command does its work, says so on stdout, and says the same as JSON."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffedit import Edit


def encoder_weight(folder: Path) -> torch.Tensor:
    encoder = StableDiffusionPipeline.from_pretrained(folder).text_encoder
    root = getattr(encoder, "text_model", encoder)
    return root.encoder.layers[0].self_attn.out_proj.weight.detach()


def picture_size(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def test_ablate_saves_an_edit_and_describes_it(cli, model):
    outcome = cli("ablate", model, "dog", "--target", "cat", "-o", "out", "--json")
    assert outcome.code == 0, outcome.err
    document = outcome.document
    edit = Edit.load("out")
    assert document["edit"]["id"] == edit.id
    assert document["edit"]["requests"][0]["subject"] == "dog"
    assert document["edit"]["requests"][0]["target"] == "cat"
    assert document["edit"]["requests"][0]["target_reason"] == "given"
    assert document["folder"] == "out"
    assert document["files"] == {path.name: path.stat().st_size for path in Path("out").iterdir()}
    site = document["edit"]["sites"][0]
    assert site["layer"] == 0 and site["norm"] == pytest.approx(edit.delta.factors[edit.delta.sites[0]].norm())


def test_text_output_names_target_reason_and_how_to_load(cli, model):
    outcome = cli("ablate", model, "dog", "-o", "out")
    assert outcome.code == 0, outcome.err
    assert "dog" in outcome.out and "nearest of 2 general nouns" in outcome.out
    assert "load_lora_weights('out')" in outcome.out and "PeftModel.from_pretrained" in outcome.out


def test_default_folder_is_named_after_the_edit(cli, model):
    assert cli("ablate", model, "dog", "pig", "--target", "cat", "--json").document["folder"] == "ablate-dog-pig"
    assert Edit.load("ablate-dog-pig").requests[1].subject == "pig"


def test_every_option_reaches_the_request(cli, model):
    outcome = cli(
        *("ablate", model, "dog", "--target", "cat", "--alias", "hound", "--preserve", "pig", "--template", "my {}"),
        *("--kind", "object", "--random-seed", "5", "-o", "out", "--json"),
    )
    assert outcome.code == 0, outcome.err
    request = Edit.load("out").requests[0]
    assert (request.aliases, request.preserve, request.templates, request.seed) == (("hound",), ("pig",), ("my {}",), 5)


def test_settings_reach_updater_and_locator(cli, model):
    outcome = cli(
        *("ablate", model, "dog", "--target", "cat", "--updater", "quickfix", "-o", "out", "--json"),
        *("--set", "lam=0.5", "--set", "locator.layer=1", "--set", "locator.tokens=all_subject"),
    )
    assert outcome.code == 0, outcome.err
    edit = outcome.document["edit"]
    assert edit["updater"]["settings"]["lam"] == 0.5
    assert edit["locator"]["settings"]["layer"] == 1 and edit["sites"][0]["layer"] == 1
    assert edit["tokens"] == "all_subject"


def test_update_needs_and_keeps_its_target(cli, model):
    outcome = cli("update", model, "dog", "boat", "-o", "out", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document["edit"]["requests"][0]["action"] == "update"
    assert outcome.document["edit"]["requests"][0]["target"] == "boat"


def test_show_reads_what_ablate_wrote(cli, model):
    made = cli("ablate", model, "dog", "--preserve", "pig", "-o", "out", "--json").document["edit"]
    shown = cli("show", "out", "--json").document["edit"]
    for document in (made, shown):
        for site in document["sites"]:
            site["norm"] = pytest.approx(site["norm"])
    assert shown == made
    text = cli("show", "out").out
    for word in ("dog", "pig", "quickfix", "fixed", made["id"], "self_attn.out_proj"):
        assert word in text


def test_apply_merges_edits_into_a_pipeline_for_stock_diffusers(cli, model):
    assert cli("ablate", model, "dog", "--target", "cat", "-o", "one").code == 0
    assert cli("update", model, "pig", "boat", "-o", "two").code == 0
    outcome = cli("apply", model, "--edit", "one", "--edit", "two", "-o", "merged", "--json")
    assert outcome.code == 0, outcome.err
    assert len(outcome.document["edits"]) == 2
    deltas = [Edit.load(name).delta for name in ("one", "two")]
    change = sum(factor.dense() for delta in deltas for _, factor in delta)
    expected = (encoder_weight(model).double() + change).float()
    assert torch.equal(encoder_weight(Path("merged")), expected)
    assert cli("apply", model, "--edit", "one", "-o", "merged", "--json").error["code"] == "DE-504"


def test_generate_writes_one_picture_per_prompt_and_seed(cli, model):
    cli("ablate", model, "dog", "--target", "cat", "-o", "edit")
    command = ("generate", model, "a dog", "a cat", "--seed", 3, "--seed", 4, "--steps", 1)
    before = cli(*command, "-o", "before", "--json")
    after = cli(*command, "-o", "after", "--edit", "edit", "--json")
    assert before.code == after.code == 0, before.err + after.err
    asked = [(item["prompt"], item["seed"]) for item in before.document["pictures"]]
    assert asked == [("a dog", 3), ("a dog", 4), ("a cat", 3), ("a cat", 4)]
    assert after.document["edits"] == [Edit.load("edit").id]
    files = [Path(item["file"]) for item in before.document["pictures"]]
    assert [picture_size(file) for file in files] == [(16, 16)] * 4
    assert any(file.read_bytes() != (Path("after") / file.name).read_bytes() for file in files)


def test_preview_draws_into_the_folder_and_leaves_the_edit_loadable(cli, model):
    outcome = cli("ablate", model, "dog", "--target", "cat", "--preserve", "pig", "-o", "out", "--preview", "--json")
    assert outcome.code == 0, outcome.err
    picture = Path(outcome.document["preview"])
    assert picture == Path("out/before_after.png") and picture_size(picture)[0] > 1000
    assert Edit.load("out").requests[0].subject == "dog"
    again = cli("ablate", model, "dog", "--target", "pig", "-o", "out", "--overwrite", "--json")
    assert again.code == 0 and not picture.exists(), "the picture of a replaced edit goes with it"


def test_list_shows_references_and_settings(cli):
    document = cli("list", "--json").document
    names = {kind: [record["name"] for record in document[kind]] for kind in ("backends", "locators", "updaters")}
    assert {"sd1", "sd2"} <= set(names["backends"])
    assert "fixed" in names["locators"] and {"quickfix", "quickfix-published"} <= set(names["updaters"])
    for kind in names:
        assert all(record["reference"] and record["error"] is None for record in document[kind])
    settings = next(r["settings"] for r in document["updaters"] if r["name"] == "quickfix")
    lam = next(item for item in settings if item["name"] == "lam")
    assert lam["type"] == "float" and "weakens the edit" in lam["description"]
    assert all(name in cli("list").out for kind in names.values() for name in kind)
