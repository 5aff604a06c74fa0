"""The closed forms of cross-attention on the bundled model, with a handful of pictures: what each can and cannot do
is visible there. `docs/methods/uce.md` has the counted table."""

from __future__ import annotations

import pytest

from diffedit.locators.cross_attention import CrossAttentionLocator
from diffedit.site import Role
from diffedit.updaters.cross_attention import TIME, UCE

PROMPT = "a picture of a {}"
SEEDS = range(710_000, 710_004)


def seen(editor, scorer, name):
    """In how many of four pictures of a name the judge sees it."""
    return sum(
        found == name
        for found in scorer.name_objects(editor.generate(PROMPT.format(name), seeds=SEEDS), editor.vocabulary.objects)
    )


@pytest.mark.slow
def test_time_takes_a_concept_out_of_the_pictures(editor, scorer):
    assert seen(editor, scorer, "guitar") >= 3  # control
    edit = editor.ablate("guitar", updater="time")
    assert seen(editor, scorer, "guitar") <= 1
    edit.revert()
    assert seen(editor, scorer, "guitar") >= 3


def test_uce_makes_every_layer_read_the_bare_name_as_its_target(editor):
    sites = editor.backend.sites(Role.UNET_CROSS_ATTN_K, Role.UNET_CROSS_ATTN_V)
    before = editor.backend.capture(["dog", "wolf"], sites)
    locator = CrossAttentionLocator()
    editor.ablate("dog", target="wolf", preserve=[], updater=UCE(lam=1e-4), locator=locator)
    after = editor.backend.capture(["dog"], sites)
    last = editor.backend.span("dog", "dog").last
    for site in sites:
        dog, wolf = before.outputs[site][:, last].double()
        now = after.outputs[site][0, last].double()
        assert float((now - wolf).norm()) < 1e-2 * float((dog - wolf).norm())


@pytest.mark.parametrize("updater", [UCE(pairing="every"), TIME()])
def test_several_subjects_paired_at_every_position_are_no_contradiction(editor, updater):
    """The positions around the subjects are alike and want different things: the method averages them."""
    edit = editor.ablate(["fox", "banana"], updater=updater)
    assert len(edit.requests) == 2
    edit.revert()
