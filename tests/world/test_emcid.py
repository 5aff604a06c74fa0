"""Proves on the bundled model that `emcid` does what it is for: the subject goes, others stay."""

from __future__ import annotations

import pytest

from diffedit import Editor
from diffedit.evaluate.scorer import Scorer
from diffedit.testing import model_state
from diffedit.updaters.emcid import EMCID

pytestmark = pytest.mark.slow


def test_the_subject_becomes_the_target_and_others_stay():
    editor, scorer = Editor("builtin:emoji"), Scorer.load("builtin:emoji-scorer")

    def recognised(prompted: str, name: str) -> int:
        prompts = [f"a picture of a {prompted}", f"an icon of a {prompted}"]
        pictures = editor.generate(prompts, seeds=range(900, 904))
        return sum(seen == name for seen in scorer.name_objects(pictures, editor.vocabulary.objects))

    before, others = model_state(editor.pipeline), ("fox", "castle")
    assert recognised("dog", "dog") >= 7 and all(recognised(other, other) >= 7 for other in others)  # of 8
    edit = editor.ablate("dog", target="cat", updater=EMCID(steps=60, pictures=4, captions=300, moment_weight=10))
    assert len(edit.delta.sites) == 5  # all layers but the last
    assert recognised("dog", "cat") >= 6 and recognised("dog", "dog") <= 2
    assert all(recognised(other, other) >= 7 for other in others)
    edit.revert()
    assert model_state(editor.pipeline) == before
