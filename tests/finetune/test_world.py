"""Proves on the bundled model that the cheapest baseline does what it is for: the subject goes, others stay.

`benchmarks/finetune.py` measures the others, which take minutes of training.
"""

from __future__ import annotations

import pytest

from diffedit import Editor, registry
from diffedit.evaluate.scorer import Scorer
from diffedit.testing import model_state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def editor():
    return Editor("builtin:emoji")


@pytest.fixture(scope="module")
def scorer():
    return Scorer.load("builtin:emoji-scorer")


def recognised(editor, scorer, name):
    pictures = editor.generate([f"a picture of a {name}", f"an icon of a {name}"], seeds=range(900, 904))
    return sum(seen == name for seen in scorer.name_objects(pictures, editor.vocabulary.objects))


def test_the_subject_goes_and_others_stay(editor, scorer):
    before, others = model_state(editor.pipeline), ("fox", "guitar")
    stayed = {other: recognised(editor, scorer, other) for other in others}
    assert recognised(editor, scorer, "dog") >= 7 and min(stayed.values()) >= 7  # of 8: the judge sees them
    updater = registry.configure("updaters", "finetune-text-encoder", {"steps": 100})
    edit = editor.ablate("dog", target="cat", updater=updater)
    assert recognised(editor, scorer, "dog") <= 2
    assert all(recognised(editor, scorer, other) >= stayed[other] - 1 for other in others)
    edit.revert()
    assert model_state(editor.pipeline) == before
