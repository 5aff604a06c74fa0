"""Proves that an interrupted training ends the same as one that was not, and that a checkpoint serves no other."""

from __future__ import annotations

import pytest
import torch

from diffedit import Editor
from diffedit.errors import MalformedArtifactError, StorageError
from diffedit.updaters.finetune.checkpoint import Checkpoint, State
from tests.finetune.conftest import METHODS, configure, listening, locate, request
from tests.finetune.test_objectives import same


def count(updater):
    """The updater, and the list of steps it will report."""
    steps = []
    return updater.watched(lambda step, *_: steps.append(step)), steps


@pytest.mark.parametrize(("method", "stop"), [*((name, 4) for name in METHODS), ("text encoder, embedding", 1)])
def test_an_interrupted_training_goes_on_and_ends_the_same(tokenizer_folder, tmp_path, method, stop):
    editor = Editor(listening(tokenizer_folder))
    plain = configure(method)
    location = locate(editor, plain)
    asked = [request(preserve=["fox"])]
    whole = plain.train(editor.backend, asked, location)

    def interrupt(step, *_):
        if step == stop:
            raise KeyboardInterrupt

    kept = configure(method, checkpoint_dir=tmp_path / "new" / "folder", checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        kept.watched(interrupt).train(editor.backend, asked, location)
    fresh = Editor(listening(tokenizer_folder))  # as in another process
    again, steps = count(kept)
    resumed = again.train(fresh.backend, asked, location)
    assert steps == list(range(stop - stop % 2 + 1, 7))  # from the last multiple of checkpoint_every
    assert same(whole.delta, resumed.delta) and whole.training.history == resumed.training.history
    done, steps = count(kept)
    assert same(whole.delta, done.train(fresh.backend, asked, location).delta) and steps == []
    assert [path.suffix for path in (tmp_path / "new" / "folder").iterdir()] == [".safetensors"]


def test_another_training_does_not_find_the_checkpoint(editor, tmp_path):
    def train(asked, **settings):
        updater, steps = count(configure("text encoder, embedding", checkpoint_dir=tmp_path, **settings))
        updater.train(editor.backend, [asked], locate(editor, updater))
        return len(steps)

    assert train(request()) == 6 and train(request()) == 0
    assert train(request(seed=1)) == 6 and train(request(target="pig")) == 6
    assert train(request(), learning_rate=1e-5) == 6 and train(request(), steps=7) == 7
    assert train(request(), rank=1) == 0  # how the change is stored is no part of the training
    with torch.no_grad():
        editor.pipeline.text_encoder.get_input_embeddings().weight[3, 3] += 1e-3
    assert train(request()) == 6


def test_where_checkpoints_lie_is_no_part_of_the_edit(editor, tmp_path):
    with_dir = editor.run([request()], updater=configure("esd", steps=1, checkpoint_dir=tmp_path))
    with_dir.revert()
    without = editor.run([request()], updater=configure("esd", steps=1))
    assert with_dir.id == without.id and str(tmp_path) not in with_dir.manifest.model_dump_json()


def test_a_damaged_checkpoint_is_an_error_and_not_a_fresh_start(editor, tmp_path):
    updater = configure("text encoder, embedding", checkpoint_dir=tmp_path)
    updater.solve(editor.backend, [request()], locate(editor, updater))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for data in (b"", b"no checkpoint", whole[:200], whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(MalformedArtifactError, match="Delete it and train again"):
            updater.solve(editor.backend, [request()], locate(editor, updater))


def test_a_folder_that_cannot_be_written_is_an_error_before_any_step(editor, tmp_path):
    (tmp_path / "file").write_text("")
    updater, steps = count(configure("text encoder, embedding", checkpoint_dir=tmp_path / "file" / "folder"))
    with pytest.raises(StorageError, match="Choose another checkpoint_dir"):
        updater.solve(editor.backend, [request()], locate(editor, updater))
    assert steps == []


def test_a_write_that_fails_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    place = Checkpoint(tmp_path, "esd", "0" * 64)
    assert place.load() is None
    place.save(State({"step": 1}, {"a": torch.ones(2)}))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffedit.updaters.finetune.checkpoint.os.replace", full)
    with pytest.raises(StorageError, match="No space left"):
        place.save(State({"step": 2}, {"a": torch.zeros(2)}))
    found = place.load()
    assert found.numbers == {"step": 1} and torch.equal(found.tensors["a"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == [place.path.name]
