"""The before/after picture: every image where it belongs, at a size people can see."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diffedit.cli import preview
from diffedit.cli.preview import CELL, Row, before_after_grid
from diffedit.cli.scenes import choose_scenes
from diffedit.errors import RequestError
from diffedit.interfaces import Vocabulary
from diffedit.request import make_request


def flat(colour: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def centres(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return sum(count for count, value in sheet.getcolors(1 << 24) if value == colour)


def test_every_picture_is_drawn_once():
    rows = [
        Row("subject", "a dog", [flat("#ff0000"), flat("#00ff00")], [flat("#0000ff"), flat("#ffff00")]),
        Row("unrelated", "a boat", [flat("#ff00ff"), flat("#00ffff")], [flat("#800000"), flat("#008000")]),
    ]
    sheet = before_after_grid(rows, seeds=(0, 1), title="ablate 'dog'", note="a note")
    border = CELL * CELL - (CELL - 2) ** 2
    for colour in ("#ff0000", "#0000ff", "#ff00ff", "#00ffff", "#800000", "#008000", "#00ff00", "#ffff00"):
        rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert centres(sheet, rgb) == CELL * CELL - border


def test_before_is_left_of_after():
    sheet = before_after_grid([Row("subject", "a dog", [flat("#ff0000")], [flat("#0000ff")])])
    pixels = sheet.load()
    row = [pixels[x, sheet.height - preview.MARGIN - CELL // 2] for x in range(sheet.width)]
    assert row.index((255, 0, 0)) < row.index((0, 0, 255))


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (100, 60), (128, 128), (512, 512), (768, 512)])
def test_any_size_fits_its_cell(size):
    sheet = before_after_grid([Row("subject", "a dog", [flat("#ff0000", size)], [flat("#0000ff", size)])])
    share = centres(sheet, (255, 0, 0)) / CELL**2
    assert 0.3 < share <= 1


def test_small_pixels_stay_crisp():
    checks = Image.new("RGB", (2, 2), "#000000")
    checks.putpixel((0, 0), (255, 0, 0))
    sheet = before_after_grid([Row("subject", "x", [checks], [flat("#0000ff")])])
    assert centres(sheet, (255, 0, 0)) >= (CELL // 2 - 1) ** 2


def test_long_labels_stay_in_their_column():
    short = before_after_grid([Row("subject", "a dog", [flat("#ff0000")], [flat("#0000ff")])])
    long = before_after_grid([Row("subject", "word " * 60 + "x" * 200, [flat("#ff0000")], [flat("#0000ff")])])
    assert long.size == short.size
    left = preview.MARGIN + preview.LABEL
    start = short.crop((left, 0, short.width, short.height))
    assert start.tobytes() == long.crop((left, 0, long.width, long.height)).tobytes()


@pytest.mark.parametrize(
    ("rows", "seeds"),
    [
        ([], ()),
        ([Row("s", "p", [], [])], ()),
        ([Row("s", "p", [flat("#000000")], [])], ()),
        ([Row("s", "p", [flat("#000000")], [flat("#000000")])], (0, 1)),
    ],
)
def test_rows_and_seeds_must_agree(rows, seeds):
    with pytest.raises(RequestError, match="one image per seed"):
        before_after_grid(rows, seeds=seeds)


def fake_editor(objects=(), styles=()):
    """An editor whose text encoder puts names at their alphabetical position."""

    def features(prompts):
        return torch.tensor([[float(ord(prompt.split()[-1][0])), 1.0] for prompt in prompts])

    return SimpleNamespace(vocabulary=Vocabulary(objects, styles), backend=SimpleNamespace(features=features))


def groups(scenes):
    return {name: [s.prompt for s in scenes if s.group == name] for name in ("subject", "neighbours", "unrelated")}


def test_scenes_of_an_object():
    editor = fake_editor(("ant", "bee", "cow", "xerus", "yak", "zebra"))
    chosen = groups(choose_scenes(editor, [make_request(subject="ant", target="insect", preserve=("cow",))]))
    assert chosen["subject"] == ["an ant", "a picture of an ant"]
    assert chosen["neighbours"] == ["a cow", "a bee"], "what is to be preserved comes first, then the nearest"
    assert set(chosen["unrelated"]) == {"a yak", "a zebra"}


def test_scenes_of_several_objects_show_each():
    editor = fake_editor(("ant", "bee", "cow", "yak", "zebra"))
    chosen = groups(choose_scenes(editor, [make_request(subject=name) for name in ("ant", "bee")]))
    assert chosen["subject"] == ["an ant", "a bee"]
    assert "a bee" not in chosen["neighbours"] + chosen["unrelated"]


def test_scenes_of_a_style():
    editor = fake_editor(("ant", "bee", "cow"), ("flat", "blob", "noto"))
    chosen = groups(choose_scenes(editor, [make_request(subject="flat", target="picture", kind="style")]))
    assert chosen["subject"] == ["an ant in the style of flat", "a bee in the style of flat"]
    assert all("in the style of" in prompt for prompt in chosen["neighbours"])
    assert all("style" not in prompt for prompt in chosen["unrelated"])


def test_scenes_without_a_vocabulary():
    chosen = groups(choose_scenes(fake_editor(), [make_request(subject="Snoopy", target="dog")]))
    assert chosen["neighbours"] == ["a dog"] and len(chosen["unrelated"]) == 2
