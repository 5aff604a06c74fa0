"""`refact` on tiny pipelines: the search lowers its loss, the layer writes what was found, everyday prompts are moved
least, the second moment is the captions' own and is found again by content, and nothing of the model changes."""

from __future__ import annotations

import dataclasses
import logging
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffedit import Editor, compose
from diffedit.errors import (
    MalformedArtifactError,
    NoOpError,
    NotComposableError,
    RequestError,
    StorageError,
    UnsupportedModelError,
)
from diffedit.locators.text_mlp import TextMLPLocator
from diffedit.request import make_request
from diffedit.site import Location, TokenRule
from diffedit.testing import model_state, unchanged
from diffedit.updaters.everyday import captions, second_moment
from diffedit.updaters.rank_one import ReFACT
from diffedit.updaters.steering import Descent, Steering
from tests.oracle.strategies import close

HOW = Descent(steps=40, learning_rate=0.1, decay=0.0, clamp=10.0, temperature=0.2, enough=0.99)
QUICK = ReFACT(steps=5, captions=30, negatives=3, learning_rate=0.2)


def mlp(pipe, layer):
    """The layer itself, in either layout."""
    root = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
    return root.encoder.layers[layer].mlp.fc2


def pooled(pipe, prompts):
    ids = pipe.tokenizer(prompts, padding="longest", return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids).pooler_output


@pytest.fixture
def site(sd1):
    return TextMLPLocator(layer=0).locate(Editor(sd1).backend, []).sites[0]


def test_the_search_finds_an_output_that_means_the_target(pipeline):
    backend = Editor(pipeline).backend
    (site,) = TextMLPLocator(layer=0).locate(backend, []).sites
    with unchanged(pipeline, "steering"):
        steering = Steering(backend, site)
        wanted = steering.summaries(["a cat"])
        found = steering.find(["a dog"], [2], wanted, steering.summaries(["a fox"]), HOW)
        still = steering.find(["a dog"], [2], wanted, wanted[:0], dataclasses.replace(HOW, learning_rate=1e-12))
    assert torch.allclose(wanted, pooled(pipeline, ["a cat"]), atol=1e-5)
    assert found.after > 0.6 > 0.5 > found.before and 0 < found.steps <= 40
    assert abs(still.after - still.before) < 1e-3  # control: without a step nothing is won
    # the pipeline itself, with the output moved by a hook of this test
    handle = mlp(pipeline, 0).register_forward_hook(
        lambda m, a, o: o.index_put((torch.tensor(0), torch.tensor(2)), o[0, 2] + found.delta.float())
    )
    moved = pooled(pipeline, ["a dog"])
    handle.remove()
    assert float((moved - wanted).norm()) < 0.9 * float((pooled(pipeline, ["a dog"]) - wanted).norm())


def test_the_search_keeps_within_its_clamp(sd1, site):
    backend = Editor(sd1).backend
    steering = Steering(backend, site)
    tight = dataclasses.replace(HOW, clamp=0.1)
    found = steering.find(["a dog"], [2], steering.summaries(["a cat"]), steering.summaries(["a fox"]), tight)
    size = backend.capture(["a dog"], [site]).outputs[site][0, 2].norm()
    assert float(found.delta.norm()) <= 0.1 * float(size) * (1 + 1e-5)


def test_an_edit_writes_what_was_found_and_reverts_to_the_bit(pipeline):
    editor, before = Editor(pipeline), model_state(pipeline)
    layer = mlp(pipeline, 1)
    editor.backend.capture(["a dog"], editor.backend.sites())
    edit = editor.ablate("dog", target="cat", preserve=["fox"], aliases=["pup"], updater=QUICK)
    (site,) = edit.delta.sites
    assert site.path.endswith("layers.1.mlp.fc2") and edit.manifest.locator.name == "text-mlp"
    after = model_state(pipeline)
    assert len([key for key in before if before[key] != after[key]]) == 1 and edit.delta.factors[site].rank == 2
    assert layer.weight is editor.backend.weight(site)
    edit.revert()
    assert model_state(pipeline) == before
    with pytest.raises(NotComposableError, match="keeps none"):
        compose([edit])


def test_the_change_is_the_published_formula(sd1, site):
    """From keys, delta and moment that this test reads for itself."""
    editor = Editor(sd1)
    request = make_request(subject="dog", target="cat", templates=["{}", "a {}"])
    location = TextMLPLocator(layer=0).locate(editor.backend, [request])
    updater = ReFACT(steps=5, captions=40, negatives=2, moment_ridge=1e-2)
    change = updater.solve(editor.backend, [request], location).factors[site].dense().numpy()
    keys = {}
    handle = mlp(sd1, 0).register_forward_hook(lambda m, args, out: keys.update(x=args[0].detach().double().numpy()))
    rows = []
    for prompt in islice(captions(), 40):
        ids = sd1.tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt").input_ids
        sd1.text_encoder(ids)
        rows.append(keys["x"][0])
    k = []
    for prompt in ("dog", "a dog"):
        sd1.text_encoder(sd1.tokenizer(prompt, return_tensors="pt").input_ids)
        k.append(keys["x"][0, -2])
    handle.remove()
    rows, k = np.concatenate(rows), np.mean(k, 0)
    moment = rows.T @ rows / len(rows)
    moment += 1e-2 * np.trace(moment) / len(moment) * np.eye(len(moment))
    direction = np.linalg.solve(moment, k)
    delta = change @ k
    assert np.linalg.norm(delta) > 1e-2
    assert close(change, np.outer(delta, direction) / (k @ direction), 1e-4)
    plain = np.outer(delta, k) / (k @ k)  # control: without the moment everyday inputs are moved more
    assert np.linalg.norm(rows @ change.T) < 0.9 * np.linalg.norm(rows @ plain.T)


def test_the_second_moment_is_found_again_by_content(sd1, site, tmp_path):
    backend = Editor(sd1).backend
    plain = second_moment(backend, site, 12)
    kept = second_moment(backend, site, 12, tmp_path / "moments")
    (file,) = (tmp_path / "moments").iterdir()
    assert torch.equal(kept.total_root, plain.total_root) and kept.count == plain.count
    assert set(load_file(file)) == {"root", "count"}
    stamp = file.stat().st_mtime_ns
    again = second_moment(backend, site, 12, tmp_path / "moments")
    assert torch.equal(again.root(1e-3), plain.root(1e-3)) and again.count == plain.count
    assert file.stat().st_mtime_ns == stamp
    second_moment(backend, site, 13, tmp_path / "moments")
    weight = mlp(sd1, 2).weight.data
    was = float(weight[0, 0])
    weight[0, 0] += 1  # any weight of the encoder: another model
    second_moment(backend, site, 12, tmp_path / "moments")
    assert len(list((tmp_path / "moments").iterdir())) == 3
    file.write_bytes(file.read_bytes()[:-9])
    weight[0, 0] = was
    with pytest.raises(MalformedArtifactError, match="is damaged"):
        second_moment(backend, site, 12, tmp_path / "moments")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be kept"):
        second_moment(backend, site, 12, tmp_path / "file")


def test_where_it_is_kept_is_no_part_of_the_edit(sd1, tmp_path):
    editor = Editor(sd1)
    first = editor.ablate("dog", target="cat", updater=QUICK)
    first.revert()
    again = editor.ablate("dog", target="cat", updater=QUICK.model_copy(update={"cache_dir": tmp_path}))
    assert again.id == first.id and list(tmp_path.iterdir())


def test_captions_do_not_repeat():
    some = list(islice(captions(), 11 * 53 * 29))
    assert len(set(some)) == len(some) and all("{" not in caption for caption in some)


def test_a_search_that_fails_is_logged(sd1, caplog):
    with caplog.at_level(logging.WARNING, "diffedit"):
        Editor(sd1).ablate("dog", target="cat", updater=QUICK.model_copy(update={"learning_rate": 1e-3, "steps": 1}))
    assert "means 'cat' with probability" in caplog.text


def test_what_cannot_be_is_said(sd1, site):
    editor, before = Editor(sd1), model_state(sd1)
    with pytest.raises(UnsupportedModelError, match="no MLP at layer 9"):
        editor.ablate("dog", target="cat", updater=QUICK, locator=TextMLPLocator(layer=9))
    with pytest.raises(RequestError, match="one layer at the last token"):
        editor.ablate("dog", target="cat", updater=QUICK, locator=TextMLPLocator(tokens=TokenRule.EOS))
    same = make_request(subject="dog", target="cat").model_copy(update={"target": "dog"})
    with pytest.raises(NoOpError, match="already says"):
        QUICK.solve(editor.backend, [same], Location((site,), TokenRule.LAST_SUBJECT, "x", "y"))
    with pytest.raises(RequestError, match="needs captions"):
        second_moment(editor.backend, site, 0)
    with pytest.raises(UnsupportedModelError, match=r"no such edit site|cannot be steered"):
        Steering(editor.backend, dataclasses.replace(site, component="vae"))
    assert model_state(sd1) == before
