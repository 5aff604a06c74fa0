"""A whole evaluation with a scripted model: numbers worked out by hand, refusals, and nothing lost."""

from __future__ import annotations

import json

import pytest
import torch

from diffedit import Editor
from diffedit.errors import (
    BaseMismatchError,
    MalformedArtifactError,
    OutputExistsError,
    RequestError,
    StorageError,
    UnsupportedVersionError,
)
from diffedit.evaluate.gallery import Gallery
from diffedit.evaluate.metrics import rate
from diffedit.evaluate.records import FILE, Evaluation
from diffedit.evaluate.run import evaluate_edit
from tests.evaluate.conftest import Reader, shown


def run(editor, edit, judge=None, **settings):
    return evaluate_edit(editor, edit, scorer=judge or Reader(), **{"images": 10, **settings})


def kinds(found, name):
    return {part.kind: part for part in found.finding(name).parts}


def test_an_edit_that_does_nothing_has_no_effect(editor, edit, painter):
    found = run(editor, edit)
    for name, value in (("efficacy", 0), ("specificity_near", 1), ("specificity_far", 1), ("fidelity_clip", 1)):
        assert found.finding(name).value == value, name
    assert found.finding("generality").value == 0
    assert found.finding("becomes_target").value == 0
    assert abs(found.finding("fidelity_mmd").value) < 1e-9
    assert painter.drawn == 2 * len(found.pictures)


def test_a_perfect_edit(editor, edit, painter):
    painter.script = lambda prompt, seed, edited: "cat" if edited and shown(prompt) == "dog" else shown(prompt)
    found = run(editor, edit)
    for name in ("efficacy", "generality", "specificity_near", "specificity_far", "becomes_target"):
        assert found.finding(name).value == 1, name
    low = 0.025 ** (1 / 10)
    assert found.finding("efficacy").low == pytest.approx(low) and found.finding("efficacy").high == 1


def test_efficacy_by_hand(editor, edit, painter):
    """Ten dogs: one was never seen, two are still there, the rest became three cats and four trees."""

    def script(prompt, seed, edited):
        if shown(prompt) != "dog":
            return shown(prompt)
        if seed == 0:
            return "pig"
        return "dog" if not edited or seed in (1, 2) else "cat" if seed < 6 else "tree"

    painter.script = script
    found = run(editor, edit)
    efficacy = found.finding("efficacy")
    assert (efficacy.value, efficacy.n) == (7 / 9, 9)
    assert (efficacy.low, efficacy.high) == (rate(7, 9).low, rate(7, 9).high)
    (part,) = efficacy.parts
    assert (part.before.hits, part.after.hits, part.kept.hits, part.kept.n) == (9, 2, 2, 9)
    assert found.finding("becomes_target").value == 3 / 9
    first = found.pictures[0]
    assert (first.seed, first.seen_before, first.seen_after) == (0, "pig", "pig")


def test_specificity_by_hand(editor, edit, painter):
    """A concept that was not seen before counts for nothing, neither way; a lost one counts once."""

    def script(prompt, seed, edited):
        name = shown(prompt)
        if name == "house":
            return "tree" if seed % 2 == edited else "house"  # seen before at odd seeds, after at even ones
        return "boat" if edited and name == "cat" and seed == 101 else name

    painter.script = script
    found = run(editor, edit, near=["cat", "house"], far=["tree"], images=8, seed=100)
    near = found.finding("specificity_near")
    cats = [p for p in found.pictures if p.group == "near" and p.name == "cat"]
    houses = [p for p in found.pictures if p.group == "near" and p.name == "house"]
    assert [p.seed for p in cats] == [100, 102, 104, 106] and [p.seed for p in houses] == [101, 103, 105, 107]
    assert near.value == 0.5 and near.n == 8, "four cats kept, four houses lost"
    assert found.finding("specificity_far").value == 1


def test_what_was_asked_to_stay_is_marked(editor, edit, painter):
    found = run(editor, edit, near=["pig", "boat"])
    assert {part.name: part.preserved for part in found.finding("specificity_near").parts} == {
        "pig": True,
        "boat": False,
    }


def test_fidelity_by_hand(editor, edit, painter):
    """Half of the everyday pictures lose their subject: half of the CLIPScore is left."""
    everyday = ["a cat", "a house", "a tree", "a boat"]

    def script(prompt, seed, edited):
        return "fish" if edited and prompt in everyday[:2] and 1000 <= seed else shown(prompt)

    painter.script = script
    found = run(editor, edit, everyday=everyday, images=4, seed=1000, near=["pig"], far=["pig2"])
    assert found.finding("fidelity_clip").value == 0.5
    assert found.finding("fidelity_mmd").value > 0
    assert {p.clip_before for p in found.pictures if p.group == "everyday"} == {1.0}


def test_a_blind_detector_gives_no_number(editor, edit, painter):
    painter.script = lambda prompt, seed, edited: "tree" if shown(prompt) == "dog" else shown(prompt)
    found = run(editor, edit)
    for name in ("efficacy", "generality", "becomes_target"):
        finding = found.finding(name)
        assert finding.value is None and finding.low is None
        assert "does not see 'dog' in the unedited model's own pictures" in finding.refused
        assert "0 of" in finding.refused
    assert found.finding("specificity_near").value == 1
    assert "efficacy" not in [metric.name for metric in found.metrics()]


def test_the_threshold_of_detection(editor, edit, painter):
    painter.script = lambda prompt, seed, edited: "tree" if shown(prompt) == "dog" and seed < 4 else shown(prompt)
    assert run(editor, edit).finding("efficacy").value is None, "6 of 10 are fewer than 70%"
    assert run(editor, edit, least_detection=0.6).finding("efficacy").value == 0


def test_kinds_of_prompts_that_the_model_cannot_draw_are_left_out(editor, edit, painter):
    painter.script = lambda prompt, seed, edited: "tree" if edited and "dog" in prompt else shown(prompt)
    found = run(editor, edit, images=30)  # the painter does not know the plural
    parts = kinds(found, "generality")
    assert parts["other names"].refused and not parts["unseen templates"].refused
    assert found.finding("generality").value == 1 and found.finding("generality").n == 20
    assert found.finding("generality").unjudged == ()


def test_a_subject_that_is_not_seen_is_named(editor, painter):
    both = editor.ablate(["dog", "pig"], target="cat")
    editor.revert()
    painter.script = lambda prompt, seed, edited: "tree" if shown(prompt) == "pig" else shown(prompt)
    efficacy = run(editor, both).finding("efficacy")
    assert efficacy.unjudged == ("pig",) and efficacy.n == 5


def test_a_judge_that_cannot_tell_prompts_apart_measures_no_clip_score(editor, edit, painter):
    painter.script = lambda prompt, seed, edited: "fish"
    found = run(editor, edit)
    assert (
        found.finding("fidelity_clip").value is None
        and "fit their own prompts" in found.finding("fidelity_clip").refused
    )
    assert run(editor, edit, everyday=["a cat"]).finding("fidelity_clip").refused == "all everyday prompts are the same"
    one = run(editor, edit, everyday=["a cat"], images=1)
    assert "at least two" in one.finding("fidelity_mmd").refused


@pytest.mark.parametrize("inside", [False, True])
def test_the_model_is_left_as_it_was(editor, edit, painter, inside):
    if inside:
        editor.load(edit)
    site = edit.delta.sites[0]
    weight, active = editor.backend.weight(site).clone(), editor.ledger.active
    found = run(editor, edit)
    assert torch.equal(editor.backend.weight(site), weight) and editor.ledger.active == active
    assert found.weights[0] != found.weights[1]
    assert [edited for _, _, edited in painter.calls] == [False] * len(found.pictures) + [True] * len(found.pictures)


def test_other_edits_are_out_of_the_way_and_come_back(editor, edit, painter):
    alone = run(editor, edit)
    first, second = editor.ablate("pig", target="house"), editor.ablate("boat", target="tree")
    site = edit.delta.sites[0]
    weight, active = editor.backend.weight(site).clone(), editor.ledger.active
    assert active == (first.id, second.id)
    found = run(editor, edit)
    assert found.weights == alone.weights, "without the edit the model is the unedited one"
    assert torch.equal(editor.backend.weight(site), weight) and editor.ledger.active == active
    assert first.applied and second.applied and not edit.applied


def test_before_and_after_share_prompts_and_seeds(editor, edit, painter):
    run(editor, edit)
    half = len(painter.calls) // 2
    assert [call[:2] for call in painter.calls[:half]] == [call[:2] for call in painter.calls[half:]]


@pytest.mark.parametrize("stop", [0, 7, 83])
def test_an_interrupted_evaluation_goes_on(editor, edit, painter, tmp_path, stop):
    whole = run(editor, edit, out=tmp_path / "whole")
    total, painter.drawn, painter.stop_after = painter.drawn, 0, stop
    with pytest.raises(KeyboardInterrupt):
        run(editor, edit, out=tmp_path / "cut", batch_size=4)
    assert editor.ledger.active == () and not (tmp_path / "cut" / FILE).exists()
    kept = len(list((tmp_path / "cut").rglob("*.png")))
    assert kept == (stop - stop % 4 if stop < 50 else 50 + (stop - 50) // 4 * 4), "whole batches of each side"
    painter.drawn, painter.stop_after = 0, None
    again = run(editor, edit, out=tmp_path / "cut")
    assert painter.drawn == total - kept, "what was there is not drawn again"
    assert again == whole
    for name in (FILE, "report.html"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_evaluation_is_not_replaced_silently(editor, edit, painter, tmp_path):
    judge = Reader()
    first = run(editor, edit, judge, out=tmp_path / "out")
    drawn, seen = painter.drawn, judge.seen
    with pytest.raises(OutputExistsError):
        run(editor, edit, out=tmp_path / "out")
    assert run(editor, edit, judge, out=tmp_path / "out", overwrite=True) == first
    assert (painter.drawn, judge.seen) == (drawn, seen), "neither drawn nor judged again"
    picture = next((tmp_path / "out").rglob("*.png"))
    picture.write_bytes(picture.read_bytes()[:20])
    assert run(editor, edit, judge, out=tmp_path / "out", overwrite=True) == first
    assert painter.drawn == drawn + 1, "a damaged picture is drawn again"


def test_other_seeds_or_another_edit_use_no_old_pictures(editor, edit, painter, tmp_path):
    run(editor, edit, out=tmp_path)
    drawn = painter.drawn
    other = editor.ablate("dog", target="pig")
    editor.revert()
    run(editor, other, out=tmp_path, overwrite=True, near=["cat"], far=["house"])
    after = [call for call in painter.calls[drawn:] if call[2]]
    assert len(after) == 50, "every picture of the other edit is new"


def test_every_number_follows_from_the_file(editor, edit, painter, tmp_path):
    found = run(editor, edit, out=tmp_path)
    loaded = Evaluation.load(tmp_path)
    assert loaded == found and loaded.to_json() == (tmp_path / FILE).read_bytes()
    for group, name in (("near", "specificity_near"), ("far", "specificity_far")):
        mine = [p for p in loaded.pictures if p.group == group and p.seen_before == p.name]
        assert loaded.finding(name).value == sum(p.seen_after == p.name for p in mine) / len(mine)
    for picture in loaded.pictures:
        assert (tmp_path / picture.before).is_file() and (tmp_path / picture.after).is_file()


def test_files_that_are_no_evaluation(editor, edit, painter, tmp_path):
    with pytest.raises(StorageError):
        Evaluation.load(tmp_path)
    for content, error in (
        (b"{", MalformedArtifactError),
        (b"[]", MalformedArtifactError),
        (b'{"format_version": "1.0"}', MalformedArtifactError),
        (b'{"format_version": "2.0"}', UnsupportedVersionError),
    ):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(error):
            Evaluation.load(tmp_path)
    run(editor, edit, out=tmp_path, overwrite=True)
    document = json.loads((tmp_path / FILE).read_text())
    document["findings"][0]["value"] = "high"
    (tmp_path / FILE).write_text(json.dumps(document))
    with pytest.raises(MalformedArtifactError, match=r"indings\.0\.value"):
        Evaluation.load(tmp_path)


@pytest.mark.parametrize(
    "fields", [{"images": 0}, {"seed": -1}, {"least_detection": 1.5}, {"colour": "red"}, {"near": 3}]
)
def test_settings_are_checked(editor, edit, painter, fields):
    with pytest.raises(RequestError):
        run(editor, edit, **fields)
    assert painter.drawn == 0


def test_a_foreign_edit_is_refused_before_anything_is_drawn(editor, edit, painter):
    record = edit.manifest.sites[0].model_copy(update={"base_sha256": {"float32": "0" * 64}})
    edit.manifest = edit.manifest.model_copy(update={"sites": (record,)})
    with pytest.raises(BaseMismatchError):
        run(editor, edit)
    assert painter.drawn == 0


def test_a_model_without_a_judge_asks_for_one(editor, edit):
    with pytest.raises(RequestError, match="clip-vit"):
        evaluate_edit(editor, edit)
    with pytest.raises(RequestError, match="no judge"):
        evaluate_edit(editor, edit, scorer=3)


def test_progress_counts_every_picture(editor, edit, painter, tmp_path):
    told = []
    found = run(editor, edit, out=tmp_path, progress=lambda done, total: told.append((done, total)))
    total = 2 * len(found.pictures)
    assert told[-1] == (total, total) and [done for done, _ in told] == sorted(done for done, _ in told)


def test_nothing_is_written_without_a_folder(editor, edit, painter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(editor, edit)
    assert not list(tmp_path.iterdir())


def test_pictures_that_are_missing_say_so(tmp_path):
    with pytest.raises(StorageError, match="Run the evaluation again"):
        Gallery(tmp_path).read("pictures/far/a.png")
    assert not Gallery(None).has("a.png")


def test_real_pictures_of_a_tiny_model(editor, edit, tmp_path):
    """Nothing scripted: random weights draw noise, so the detector must refuse; a change is still a change."""
    found = evaluate_edit(Editor(editor.pipeline), edit, scorer="builtin:emoji-scorer", images=2, steps=1, out=tmp_path)
    assert found.finding("efficacy").value is None
    assert found.finding("fidelity_mmd").value is not None
    assert found.scorer == "builtin:emoji-scorer" and len(found.scorer_digest) == 64
