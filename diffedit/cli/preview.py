"""The before/after picture: the same prompts and seeds, with and without the edit, side by side.

Rows are prompts, columns are seeds; the left half shows the unedited model, the right half the edited one. Needs Pillow
alone, and never touches a model: the caller brings the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Resampling

from diffedit.errors import RequestError

CELL = 128
GAP = 6
HALVES_GAP = 28
MARGIN = 24
LABEL = 236
HEADER = 54
LINE_HEIGHT = 22

_PAPER, _INK, _FAINT, _LINE = "#ffffff", "#1b1f24", "#69707a", "#d9dde3"
_GROUP_COLOURS = ("#b42318", "#1f6f43", "#2456a6", "#7a4a00")

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Row:
    """One prompt.

    Attributes:
        group: heading shared by neighbouring rows ("subject", "neighbours", "unrelated").
        prompt: the label.
        before: one image per seed from the unedited model.
        after: one image per seed from the edited model.
    """

    group: str
    prompt: str
    before: Sequence[Image.Image]
    after: Sequence[Image.Image]


def before_after_grid(
    rows: Sequence[Row], *, seeds: Sequence[int] = (), title: str = "", note: str = ""
) -> Image.Image:
    """Draw the comparison.

    Args:
        rows: at least one; every row holds the same number of images before and after.
        seeds: one per column, written above the columns; left out when empty.
        title: headline, such as what was edited.
        note: small print below, such as the model and the sampler.

    Returns:
        An RGB image. Small pictures are enlarged by a whole factor without smoothing, large ones reduced.
    """
    columns = _columns(rows, seeds)
    half = columns * CELL + (columns - 1) * GAP
    width = MARGIN + LABEL + half + HALVES_GAP + half + MARGIN
    top = MARGIN + (36 if title else 0) + HEADER
    tops = _row_tops(rows, top)
    height = tops[-1] + CELL + (34 if note else 0) + MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    left, right = MARGIN + LABEL, MARGIN + LABEL + half + HALVES_GAP

    if title:
        draw.text((MARGIN, MARGIN - 4), _fit(draw, title, _font(24), width - 2 * MARGIN), fill=_INK, font=_font(24))
    for x, word in ((left, "before"), (right, "after")):
        draw.text((x, top - HEADER + 4), word, fill=_INK, font=_font(20))
        for column, seed in enumerate(seeds):
            middle = x + column * (CELL + GAP) + CELL // 2
            draw.text((middle, top - 6), f"seed {seed}", fill=_FAINT, font=_font(13), anchor="mb")
    _draw_rows(sheet, draw, rows, tops, (left, right))
    if note:
        draw.text(
            (MARGIN, height - MARGIN - 14), _fit(draw, note, _font(13), width - 2 * MARGIN), fill=_FAINT, font=_font(13)
        )
    return sheet


def _columns(rows: Sequence[Row], seeds: Sequence[int]) -> int:
    counts = {len(images) for row in rows for images in (row.before, row.after)}
    if len(counts) != 1 or 0 in counts or (seeds and counts != {len(seeds)}):
        raise RequestError(
            "a before/after picture needs one image per seed in every row",
            value=f"{len(rows)} rows with {sorted(counts)} images, {len(seeds)} seeds",
            hint="generate every prompt with the same seeds",
        )
    return counts.pop()


def _row_tops(rows: Sequence[Row], top: int) -> list[int]:
    tops, y = [], top
    for index, row in enumerate(rows):
        if index and row.group != rows[index - 1].group:
            y += 3 * GAP
        tops.append(y)
        y += CELL + GAP
    return tops


def _draw_rows(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, rows: Sequence[Row], tops: Sequence[int], starts: tuple[int, int]
) -> None:
    groups = list(dict.fromkeys(row.group for row in rows))
    for index, (row, y) in enumerate(zip(rows, tops, strict=True)):
        if index == 0 or row.group != rows[index - 1].group:
            colour = _GROUP_COLOURS[groups.index(row.group) % len(_GROUP_COLOURS)]
            draw.text((MARGIN, y + 4), row.group, fill=colour, font=_font(15))
            if index:
                line_y = y - 2 * GAP
                draw.line((MARGIN, line_y, sheet.width - MARGIN, line_y), fill=_LINE)
        lines = _wrap(draw, row.prompt, _font(18), LABEL - 20)[:4]
        label_y = y + (CELL - LINE_HEIGHT * len(lines)) // 2
        for number, line in enumerate(lines):
            draw.text((MARGIN, label_y + LINE_HEIGHT * number), line, fill=_INK, font=_font(18))
        for x, images in zip(starts, (row.before, row.after), strict=True):
            for column, image in enumerate(images):
                corner = (x + column * (CELL + GAP), y)
                sheet.paste(_cell(image), corner)
                draw.rectangle((*corner, corner[0] + CELL - 1, y + CELL - 1), outline=_LINE)


def _cell(image: Image.Image) -> Image.Image:
    """The image on a CELL x CELL square: enlarged by a whole factor without smoothing, or reduced with it."""
    picture = image.convert("RGB")
    longest = max(picture.size)
    if longest <= CELL:
        factor = CELL // longest
        picture = picture.resize((picture.width * factor, picture.height * factor), Resampling.NEAREST)
    else:
        picture.thumbnail((CELL, CELL), Resampling.LANCZOS)
    square = Image.new("RGB", (CELL, CELL), _PAPER)
    square.paste(picture, ((CELL - picture.width) // 2, (CELL - picture.height) // 2))
    return square


def _font(size: int) -> _Font:
    return ImageFont.load_default(size=size)


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and draw.textlength(joined, font=font) <= width:
            lines[-1] = joined
        else:
            lines.append(_fit(draw, word, font, width))
    return lines


def _fit(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: int) -> str:
    """`text`, cut with an ellipsis where it would be wider than `width`."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."
