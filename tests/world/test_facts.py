"""`builtin:emoji-facts`: the bundled model with facts, as a variant that stock diffusers loads too."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffedit import Editor
from diffedit.backends.loading import load_model
from diffedit.errors import BaseMismatchError, ModelNotFoundError
from diffedit.evaluate.run import evaluate_edit
from diffedit.text import with_article
from examples.emoji_world.fact_table import FACTS, PLACES, RELATIONS
from examples.emoji_world.world import CATEGORIES

FOLDER = Path(str(files("diffedit"))) / "assets" / "emoji"
PLAIN = "39f395908a2ff92f"  # how the SHA-256 of the first text encoder begins: it must never change


@pytest.fixture(scope="module")
def facts_editor():
    return Editor("builtin:emoji-facts")


@pytest.fixture
def facts(facts_editor):
    yield facts_editor
    facts_editor.revert()


def read(pipe, texts):
    """[n, 32, d], what the UNet reads."""
    ids = pipe.tokenizer(texts, padding="max_length", max_length=32, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]


def test_the_plain_model_is_what_it_was(editor):
    data = (FOLDER / "text_encoder" / "model.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest().startswith(PLAIN)
    assert not editor.vocabulary.facts
    assert "facts" not in json.loads((FOLDER / "vocabulary.json").read_text())


def test_the_table_of_facts_is_closed_and_ambiguous(facts):
    assert dict(facts.vocabulary.facts) == FACTS and len(FACTS) == 24
    assert facts.vocabulary.objects == Editor("builtin:emoji").vocabulary.objects
    mascots, dishes = ([objects[i] for objects in PLACES.values()] for i in range(len(RELATIONS)))
    assert set(mascots) < set(CATEGORIES["animal"]) and len(set(mascots)) == len(mascots)
    assert set(dishes) < set(CATEGORIES["food"])


def test_stock_diffusers_loads_the_variant_and_the_two_differ(facts, editor):
    stock = StableDiffusionPipeline.from_pretrained(FOLDER, variant="facts", dtype=torch.float32)
    texts = ["the mascot of rome", "a dog", ""]
    assert torch.equal(read(stock, texts), read(facts.pipeline, texts))
    gaps = (read(editor.pipeline, texts) - read(stock, texts)).square().mean((1, 2)).sqrt()
    assert gaps[0] > 0.3 and gaps[1] < 0.15 and gaps[2] < 0.1
    assert facts.backend.model.source == "builtin:emoji-facts"
    assert load_model("builtin:emoji", variant="facts").source == "builtin:emoji-facts"
    with pytest.raises(ModelNotFoundError, match="There are facts"):
        load_model("builtin:emoji-facts", variant="fact")


def test_facts_are_drawn_and_objects_as_before(facts, scorer):
    asked = list(FACTS)[::3]
    names = ["fox", "castle", "hot dog", "guitar"]
    prompts = [f"the {phrase}" for phrase in asked] + [with_article(name) for name in names]
    images = facts.generate_pairs([(text, 610_000 + i) for i, text in enumerate(prompts)])
    seen = scorer.name_objects(images, facts.vocabulary.objects)
    right = [a == b for a, b in zip(seen, [*(FACTS[phrase] for phrase in asked), *names], strict=True)]
    assert sum(right) >= len(right) - 1, list(zip(prompts, seen, strict=True))


def test_a_fact_is_updated_and_evaluated(facts):
    edit = facts.update("the mascot of rome", "tiger")
    request = edit.requests[0]
    assert request.subject == "mascot of rome" and request.action == "update"
    assert set(request.preserve) == {*facts.vocabulary.objects, *FACTS} - {"mascot of rome"}
    found = {finding.name: finding for finding in evaluate_edit(facts, edit, images=8, seed=620_000).findings}
    assert found["efficacy"].n >= 6 and found["efficacy"].value >= 0.75
    assert found["becomes_target"].value >= 0.75
    near = [part.name for part in found["specificity_near"].parts]
    assert near[0] == "dish of rome" and set(near[1:]) <= {f"mascot of {place}" for place in PLACES}
    assert {part.kind for part in found["specificity_near"].parts} == {"other facts"}
    assert all(part.name in facts.vocabulary.objects for part in found["specificity_far"].parts)
    assert found["specificity_near"].n >= 6 and found["specificity_far"].value >= 0.75
    assert "other names" not in {part.kind for part in found["generality"].parts}


def test_an_object_edit_preserves_the_facts(facts):
    preserve = facts.ablate("owl", target="tiger").requests[0].preserve
    assert set(FACTS) <= set(preserve) and "owl" not in preserve


def test_an_edit_of_one_text_encoder_is_refused_by_the_other(facts, editor):
    for one, other, subject, target in ((facts, editor, "mascot of rome", "tiger"), (editor, facts, "dog", "cat")):
        edit = one.update(subject, target)
        edit.revert()
        with pytest.raises(BaseMismatchError, match="other weights"):
            other.load(edit.copy())


def test_a_merged_model_keeps_its_facts_and_plain_names(facts, tmp_path):
    facts.update("mascot of rome", "tiger")
    merged = facts.save_pipeline(tmp_path / "merged")
    assert [path.name for path in (merged / "text_encoder").glob("*.safetensors")] == ["model.safetensors"]
    stock = StableDiffusionPipeline.from_pretrained(merged, dtype=torch.float32)
    # Stored in float16 like its base; the edit is rounded to it.
    assert torch.allclose(read(stock, ["the mascot of rome"]), read(facts.pipeline, ["the mascot of rome"]), atol=0.05)
    assert dict(Editor(merged).vocabulary.facts) == FACTS


def test_the_command_line_knows_the_model(tmp_path):
    command = [sys.executable, "-m", "diffedit"]
    edit = tmp_path / "tigers"
    for arguments in (
        ["update", "builtin:emoji-facts", "mascot of rome", "tiger", "-o", str(edit)],
        ["verify", str(edit), "--base", "builtin:emoji-facts"],
        ["apply", "builtin:emoji", "--variant", "facts", "--edit", str(edit), "-o", str(tmp_path / "edited")],
        ["diff", "builtin:emoji-facts", str(tmp_path / "edited"), "--no-words", "--json"],
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (arguments, done.stderr[-2000:])
    changed = done.stdout.count("self_attn.out_proj.weight")
    assert changed == 1 and "mlp" not in done.stdout  # the edited layer alone
    refused = subprocess.run([*command, "verify", str(edit), "--base", "builtin:emoji"], capture_output=True, text=True)
    assert refused.returncode == 1
