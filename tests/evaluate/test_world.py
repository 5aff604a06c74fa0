"""A real edit of the bundled model, judged by its own judge: it must show what the tests with scripts only assume."""

from __future__ import annotations

import pytest

from diffedit import Editor
from diffedit.evaluate.gate import Requirement, judge
from diffedit.evaluate.run import evaluate_edit


@pytest.mark.slow
def test_a_real_edit_is_told_from_none_and_from_wreckage(tmp_path):
    editor = Editor("builtin:emoji")
    edit = editor.ablate("fox")
    found = evaluate_edit(editor, edit, images=8, steps=12, seed=700_000, out=tmp_path)
    assert edit.applied
    for name, least in (("efficacy", 0.8), ("specificity_near", 0.6), ("specificity_far", 0.7), ("fidelity_clip", 0.9)):
        assert found.finding(name).value >= least, name
    assert found.finding("fidelity_mmd").value < found.mmd_scale / 10
    assert judge(found, [Requirement.parse("efficacy>=0.8")])[0].met
    assert (tmp_path / "report.html").stat().st_size < 2_000_000

    editor.revert()
    templates = ["a {}", "a picture of a {}"]
    wreck = editor.ablate("fox", target="castle", preserve=[], templates=templates, updater="quickfix-published")
    worse = evaluate_edit(editor, wreck * 8.0, images=8, steps=12, seed=700_000)
    assert worse.finding("specificity_near").value < found.finding("specificity_near").value
    assert worse.finding("fidelity_mmd").value > 10 * max(found.finding("fidelity_mmd").value, 0.001)
