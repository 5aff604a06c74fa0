"""What is drawn for a background colour, and how its picture is named."""

from __future__ import annotations

from collections import Counter

import pytest
from PIL import Image

from benchmarks.methods.concepts import (
    COLOURS,
    COUNTS,
    FACTS,
    MANY,
    OBJECTS,
    TUNING,
    colour_compositions,
    colour_target,
    colour_templates,
    fact_target,
)
from benchmarks.methods.plan import Cell
from benchmarks.methods.scenes import BORDER, name_colour, scene
from diffedit.interfaces import Vocabulary
from diffedit.request import make_request
from diffedit.text import find
from examples.emoji_world.fact_table import FACTS as KNOWN
from examples.emoji_world.world import category_of
from tests.evaluate.conftest import Reader

WORLD = Vocabulary(objects=(*MANY, *TUNING), styles=("pixel", "sepia"), backgrounds=COLOURS, templates=("{}",))


def picture(border, middle=(0, 0, 0)):
    image = Image.new("RGB", (24, 24), border)
    image.paste(middle, (BORDER, BORDER, 24 - BORDER, 24 - BORDER))
    return image


@pytest.mark.parametrize(
    ("border", "name"),
    [
        ((248, 248, 248), "white"),
        ((240, 160, 140), "red"),
        ((150, 185, 245), "blue"),
        ((150, 215, 155), "green"),
        ((250, 225, 120), "yellow"),
        ((90, 60, 40), "other"),
        ((150, 200, 200), "other"),
    ],
)
def test_a_background_is_named_by_its_border_alone(border, name):
    assert name_colour(picture(border)) == name
    assert name_colour(picture(border, middle=(242, 150, 150))) == name


def test_colour_scenes_draw_unseen_prompts_and_never_name_the_colour_elsewhere():
    request = make_request(subject="yellow", target=colour_target("yellow"), templates=colour_templates())
    cell = Cell("colours", "default", ("yellow",), "colour", 12, 100, "quickfix")
    jobs = scene(cell, [request], WORLD, Reader()).jobs
    assert Counter(job.group for job in jobs) == dict.fromkeys(
        ("efficacy", "generality", "near", "far", "everyday"), 12
    )
    seen = {prompt for prompt, _ in request.render("yellow")}
    for job in jobs:
        named = bool(find(job.prompt, "yellow"))
        assert named == (job.group in ("efficacy", "generality"))
        assert (job.prompt in seen) == (job.group == "efficacy")
        assert (job.space == "colour") == (job.group != "far")
    assert {job.name for job in jobs if job.group == "near"} == set(COLOURS) - {"yellow"}
    assert not any(find(job.prompt, colour) for job in jobs if job.group == "far" for colour in COLOURS)
    assert len(colour_templates()) == len(set(colour_templates())) == 8
    assert len(colour_compositions()) == 2


def test_concepts_are_disjoint_and_enough():
    assert len(set(MANY)) == len(MANY) == max(COUNTS)
    assert len(OBJECTS) >= 20
    assert not set(MANY) & set(TUNING)
    assert {colour_target(name) for name in COLOURS} == set(COLOURS)


def test_facts_are_updated_to_objects_of_their_category_that_stand_in_no_fact():
    assert len(FACTS) == len(set(FACTS)) == 20 and set(FACTS) < set(KNOWN)
    for fact in FACTS:
        assert category_of(fact_target(fact)) == category_of(KNOWN[fact])
        assert fact_target(fact) not in KNOWN.values()


def test_a_facts_scene_has_other_facts_near_and_objects_far():
    world = Vocabulary(objects=(*MANY, *TUNING, "owl"), styles=("pixel",), backgrounds=COLOURS, facts=KNOWN)
    request = make_request(subject="mascot of rome", target=fact_target("mascot of rome"), action="update")
    suite = scene(
        Cell("facts", "default", ("mascot of rome",), "fact", 12, 100, "quickfix"), [request], world, Reader()
    )
    near = {job.name for job in suite.jobs if job.group == "near"}
    assert "dish of rome" in near and near < set(KNOWN) - {"mascot of rome"}
    assert {job.name for job in suite.jobs if job.group == "far"} <= set(world.objects)
    assert not set(KNOWN) & set(suite.labels["object"])
    job = next(job for job in suite.jobs if job.group == "efficacy")
    assert [suite.seen(job, name) for name in ("owl", "fox", "carrot")] == ["mascot of rome", "fox", "carrot"]
    other = next(job for job in suite.jobs if job.name == "dish of rome")
    assert [suite.seen(other, name) for name in ("owl", "carrot")] == ["owl", "dish of rome"]
