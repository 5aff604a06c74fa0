"""What is drawn: nothing that the edit saw passes for unseen, and nothing edited passes for everyday."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffedit.errors import RequestError
from diffedit.evaluate import prompts
from diffedit.evaluate.records import Settings
from diffedit.evaluate.suite import ALIASES, COMPOSED, GIVEN, NEAREST, SAME, TEMPLATES, build
from diffedit.interfaces import Vocabulary
from diffedit.request import OBJECT_TEMPLATES, make_request
from diffedit.text import find
from tests.evaluate.conftest import Reader

WORLD = Vocabulary(
    objects=("dog", "cat", "pig", "house", "tree", "boat", "fish"),
    styles=("flat", "sepia"),
    backgrounds=("red", "blue"),
    categories={"dog": "animal", "cat": "animal", "pig": "animal", "fish": "animal", "house": "building"},
    templates=("{}", "a picture of {}"),
)


def plan(requests, vocabulary=WORLD, judge=None, **fields):
    return build(requests, vocabulary, judge or Reader(), Settings(**fields))


def group(suite, name):
    return [job for job in suite.jobs if job.group == name]


def test_every_group_has_its_pictures_and_seeds_count_up():
    suite = plan([make_request(subject="dog", target="cat")], images=6, seed=40)
    assert {name: len(group(suite, name)) for name in ("efficacy", "generality", "near", "far", "everyday")} == {
        "efficacy": 6, "generality": 6, "near": 6, "far": 6, "everyday": 6
    }  # fmt: skip
    assert [job.seed for job in group(suite, "far")] == [40, 41, 42, 43, 44, 45]


def test_efficacy_goes_through_the_prompts_of_the_edit():
    request = make_request(subject="owl", target="cat", templates=["a {}", "my {}"])
    assert [job.prompt for job in group(plan([request], images=3), "efficacy")] == ["an owl", "my owl", "an owl"]


def test_unseen_prompts_are_unseen_and_of_all_kinds():
    request = make_request(subject="dog", target="cat", aliases=["hound"], templates=[*OBJECT_TEMPLATES, "one {}"])
    suite = plan([request], images=60)
    seen = {prompt.casefold() for prompt, _ in request.render("dog")}
    jobs = group(suite, "generality")
    assert Counter(job.kind for job in jobs) == {TEMPLATES: 20, ALIASES: 20, COMPOSED: 20}
    assert not seen & {job.prompt.casefold() for job in jobs}
    names = {job.prompt for job in jobs if job.kind == ALIASES}
    assert {"hound", "dogs", "a hound"} <= names and "a dogs" not in names
    assert any("style of flat" in job.prompt for job in jobs if job.kind == COMPOSED)


def test_the_users_own_names_are_tested_first():
    suite = plan([make_request(subject="dog", target="cat")], images=9, aliases=["a puppy"])
    assert next(job.prompt for job in group(suite, "generality") if job.kind == ALIASES) == "puppy"
    with pytest.raises(RequestError, match="one subject"):
        plan([make_request(subject="dog"), make_request(subject="cat")], aliases=["puppy"])


def test_near_is_the_same_category_and_far_the_rest():
    suite = plan([make_request(subject="dog", target="house")], images=12)
    assert {job.name for job in group(suite, "near")} == {"cat", "pig", "fish"}
    assert {job.name for job in group(suite, "far")} == {"house", "tree", "boat"}
    assert {job.kind for job in group(suite, "near")} == {SAME}


def test_nearness_is_the_judges():
    suite = plan([make_request(subject="tree", target="house")], judge=Reader({"tree": "boat"}), images=4, neighbours=1)
    assert {(job.name, job.kind) for job in group(suite, "near")} == {("boat", NEAREST)}


def test_without_a_vocabulary_general_nouns_take_its_place():
    suite = plan([make_request(subject="Snoopy", target="dog")], Vocabulary(), images=30)
    near, far = ({job.name for job in group(suite, name)} for name in ("near", "far"))
    assert len(near) == 8 and len(far) >= 20 and not near & far
    assert {"Snoopy", "dog"} <= set(suite.labels["object"])
    assert near | far <= set(suite.labels["object"]), "whatever is drawn can be named"
    everyday = {job.prompt for job in group(suite, "everyday")}
    assert everyday <= set(prompts.everyday_file()) and len(everyday) == 30


def test_names_of_the_user_are_taken_as_they_are():
    suite = plan([make_request(subject="dog", target="cat")], images=4, near=["a wolf", "fox"], far=["sepia"])
    assert {(job.name, job.kind, job.space) for job in group(suite, "near")} == {
        ("wolf", GIVEN, "object"), ("fox", GIVEN, "object")
    }  # fmt: skip
    assert {job.space for job in group(suite, "far")} == {"style"}
    assert {"wolf", "fox"} <= set(suite.labels["object"]) and "sepia" in suite.labels["style"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"near": ["Dog"]}, "edited itself"),
        ({"far": ["hound"]}, "edited itself"),
        ({"near": ["fox"], "far": ["the Fox"]}, "near and as far"),
        ({"near": [" "]}, "empty"),
        ({"everyday": ["\t"]}, "empty"),
    ],
)
def test_names_that_make_no_sense(fields, message):
    with pytest.raises(RequestError, match=message):
        plan([make_request(subject="dog", target="cat", aliases=["hound"])], **fields)


def test_a_style_has_styles_near_and_objects_far():
    suite = plan([make_request(subject="flat", target="picture", kind="style")], images=8)
    assert {(job.name, job.space) for job in group(suite, "near")} == {("sepia", "style")}
    assert {job.space for job in group(suite, "far")} == {"object"}
    assert all("flat" not in job.prompt for job in group(suite, "everyday"))
    assert suite.labels["style"].keys() == {"flat", "sepia"}


def test_several_subjects_are_never_each_others_neighbours():
    suite = plan([make_request(subject=name, target="house") for name in ("dog", "pig")], images=1)
    assert [job.name for job in group(suite, "efficacy")] == ["dog", "pig"], "each is seen at least once"
    assert not {"dog", "pig"} & {job.name for job in group(suite, "near") + group(suite, "far")}


def test_targets_are_names_or_what_is_filed_under_them():
    requests = [
        make_request(subject="dog", target="animal"),
        make_request(subject="boat", target="Tree"),
        make_request(subject="house", target="spaceship"),
    ]
    targets = plan(requests).targets
    assert set(targets["dog"]) == {"cat", "pig", "fish"}
    assert targets["boat"] == ("tree",) and targets["house"] == ()


@given(st.sampled_from(WORLD.objects + WORLD.styles), st.sampled_from(WORLD.objects), st.integers(1, 80))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_everyday_prompts_never_name_what_is_edited(first, second, count):
    for vocabulary in (WORLD, Vocabulary()):
        texts = prompts.everyday(vocabulary, (first, second), count)
        assert len(texts) == len(set(texts)) <= count
        assert not [text for text in texts if find(text, first) or find(text, second)]


def test_the_same_plan_twice():
    requests = [make_request(subject="dog", target="cat")]
    assert plan(requests, images=20).jobs == plan(requests, images=20).jobs
