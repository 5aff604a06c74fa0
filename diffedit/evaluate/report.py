"""The report: one HTML file that needs nothing else, on screen and on paper.

Every text goes through Jinja2's autoescape; pictures and plots are embedded as images, and a content security policy
forbids everything but them and the page's own style. Pictures are chosen without looking: evenly spread over each
group. All pictures that went wrong come after them, up to a number that is said. The page stays below two megabytes:
if it would not, thumbnails shrink, then fewer are shown.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.Image import Resampling

from diffedit.errors import StorageError
from diffedit.evaluate.findings import heading
from diffedit.evaluate.gallery import Gallery
from diffedit.evaluate.gate import Verdict
from diffedit.evaluate.metrics import need
from diffedit.evaluate.plots import clip_plot, concepts_plot, rates_plot
from diffedit.evaluate.records import GROUPS, Evaluation, Finding, Picture
from diffedit.io.folder import write_file

if TYPE_CHECKING:
    from PIL.Image import Image

REPORT = "report.html"
MOST_BYTES = 2_000_000
_SIZES = ((8, 8, 160), (8, 8, 112), (6, 6, 96), (4, 4, 96), (3, 2, 64), (2, 1, 48))
_TITLES = {
    "efficacy": "Efficacy",
    "generality": "Generality",
    "becomes_target": "Becomes the target",
    "specificity_near": "Specificity, near",
    "specificity_far": "Specificity, far",
    "fidelity_mmd": "Fidelity, CLIP-MMD",
    "fidelity_clip": "Fidelity, CLIPScore",
}


@dataclass(frozen=True)
class Shown:
    """One pair of pictures in the report.

    Attributes:
        picture: the pair.
        before: data URI of the unedited model's picture.
        after: data URI of the edited model's picture.
        outcome: what became of it, in a word or two; empty where nothing is expected.
        tone: "good" or "bad", or "dim" where the pair says nothing.
    """

    picture: Picture
    before: str
    after: str
    outcome: str
    tone: str


@dataclass(frozen=True)
class Section:
    """One group of pictures in the report."""

    title: str
    spread: tuple[Shown, ...]
    wrong: tuple[Shown, ...]
    wrong_in_all: int
    total: int
    plot: str
    plot_text: str
    findings: tuple[Finding, ...]


def write_report(evaluation: Evaluation, folder: str | Path, verdicts: Sequence[Verdict] = ()) -> Path:
    """Write `report.html` beside the evaluation's pictures, again if it is there.

    Args:
        evaluation: the evaluation.
        folder: where its pictures are.
        verdicts: on what was required of it; see `diffedit.evaluate.gate`.

    Raises:
        UnsupportedModelError: jinja2 or matplotlib is missing.
        StorageError: a picture cannot be read, or the file not written.
    """
    place = Path(folder).expanduser()
    page = render_report(evaluation, Gallery(place), verdicts)
    return write_file(place / REPORT, page.encode("utf-8"), overwrite=True)


def render_report(evaluation: Evaluation, gallery: Gallery, verdicts: Sequence[Verdict] = ()) -> str:
    """The report's text; arguments as for `write_report`, with the pictures in a gallery."""
    need("jinja2", "matplotlib")
    from jinja2 import Environment, StrictUndefined

    source = (files("diffedit") / "evaluate" / "templates" / "report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["share"] = _share
    template = environment.from_string(source)
    page = ""
    for count, failures, side in _SIZES:
        page = template.render(
            evaluation=evaluation,
            verdicts=verdicts,
            rows=[(_TITLES[found.name], found) for found in evaluation.findings],
            rates=_data("image/svg+xml", rates_plot(evaluation)),
            sections=_sections(evaluation, gallery, count, failures, side),
            subjects=", ".join(concept.subject for concept in evaluation.concepts),
        )
        if len(page.encode("utf-8")) <= MOST_BYTES:
            return page.lstrip()
    raise StorageError("the report would be too large", value=f"{len(page)} characters", hint="draw fewer pictures")


def _sections(evaluation: Evaluation, gallery: Gallery, count: int, failures: int, side: int) -> list[Section]:
    out = []
    named = {"efficacy": ("efficacy", "becomes_target"), "generality": ("generality",), "near": ("specificity_near",)}
    named |= {"far": ("specificity_far",), "everyday": ("fidelity_mmd", "fidelity_clip")}
    for group in GROUPS:
        mine = [picture for picture in evaluation.pictures if picture.group == group]
        if not mine:
            continue
        found = tuple(evaluation.finding(name) for name in named[group])
        spread = [mine[i * len(mine) // min(count, len(mine))] for i in range(min(count, len(mine)))]
        wrong = [picture for picture in mine if _outcome(picture)[1] == "bad"]
        moved = [part for part in found[0].parts if group == "near" or part.before.hits != part.after.hits]
        plot = concepts_plot(moved) if group in ("near", "far") else None
        plot = clip_plot(mine) if group == "everyday" else plot
        texts = {"near": "concepts", "far": "concepts that changed", "everyday": "CLIP cosines"}
        out.append(
            Section(
                title=heading(group),
                spread=tuple(_shown(picture, gallery, side) for picture in spread),
                wrong=tuple(_shown(picture, gallery, side) for picture in wrong[:failures]),
                wrong_in_all=len(wrong),
                total=len(mine),
                plot=_data("image/svg+xml", plot),
                plot_text=texts.get(group, ""),
                findings=found,
            )
        )
    return out


def _outcome(picture: Picture) -> tuple[str, str]:
    """What became of a pair, and its tone; pictures that were not recognised before say nothing."""
    if picture.group == "everyday":
        return "", "dim"
    before, after = (seen.casefold() == picture.name.casefold() for seen in (picture.seen_before, picture.seen_after))
    if not before:
        return f"seen as {picture.seen_before} before: does not count", "dim"
    if picture.group in ("efficacy", "generality"):
        return (f"still {picture.name}", "bad") if after else (f"now {picture.seen_after}", "good")
    return ("kept", "good") if after else (f"lost: now {picture.seen_after}", "bad")


def _shown(picture: Picture, gallery: Gallery, side: int) -> Shown:
    before, after = (_thumbnail(gallery.read(name), side) for name in (picture.before, picture.after))
    return Shown(picture, before, after, *_outcome(picture))


def _thumbnail(image: Image, side: int) -> str:
    """A picture of at most `side` pixels, as a data URI."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=88, subsampling=0)
    return _data("image/jpeg", buffer.getvalue())


def _data(kind: str, content: bytes | None) -> str:
    return "" if content is None else f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _share(value: float | None) -> str:
    """A share in percent, with a decimal where it is not whole.

    >>> _share(0.955), _share(1.0), _share(None)
    ('95.5%', '100%', '-')
    """
    return "-" if value is None else f"{100 * value:.1f}".removesuffix(".0") + "%"
