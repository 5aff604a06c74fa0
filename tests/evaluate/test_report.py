"""The report: one file, nothing but pictures and text, whatever the names say."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from diffedit import Editor
from diffedit.evaluate.gallery import Gallery
from diffedit.evaluate.gate import Requirement, judge
from diffedit.evaluate.plots import clip_plot, concepts_plot, rates_plot
from diffedit.evaluate.records import Concept, Evaluation
from diffedit.evaluate.report import MOST_BYTES, render_report, write_report
from diffedit.evaluate.run import evaluate_edit
from tests.evaluate.conftest import Painter, Reader, shown

PAYLOADS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</title><style>*{display:none}</style>",
    "{{ 7*7 }}{% raw %}",
    "$\\frac{a}{b$ & \u202e \u72ac <b>",
    "&lt;i&gt;",
)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    """A mixed outcome, and its pictures in a folder."""
    editor = Editor(str(model))
    edit = editor.ablate("dog", target="cat")
    editor.revert()

    def script(prompt, seed, edited):
        name = shown(prompt)
        if edited and name == "dog" and seed % 3:
            return "cat"
        return "boat" if edited and name == "pig" and seed % 2 else name

    editor.backend.generate = Painter(editor, script)
    folder = tmp_path_factory.mktemp("evaluation")
    return evaluate_edit(editor, edit, scorer=Reader(), images=12, near=["pig"], out=folder), folder


def renamed(evaluation: Evaluation, payload: str) -> Evaluation:
    """The evaluation with a payload wherever a person's words go."""
    pictures = tuple(
        p.model_copy(update={"prompt": payload, "name": payload, "seen_after": payload, "seen_before": payload})
        for p in evaluation.pictures
    )
    findings = tuple(
        f.model_copy(
            update={
                "parts": tuple(p.model_copy(update={"name": payload, "refused": payload}) for p in f.parts),
                "value": None,
                "refused": payload,
            }
            if f.name == "efficacy"
            else {"parts": tuple(p.model_copy(update={"name": payload}) for p in f.parts)}
        )
        for f in evaluation.findings
    )
    concepts = (Concept(subject=payload, action="ablate", kind="object", target=payload),)
    fields = {"pictures": pictures, "findings": findings, "concepts": concepts, "model": payload, "scorer": payload}
    return evaluation.model_copy(update={**fields, "edit_id": payload, "versions": {payload: payload}})


def test_the_page_says_what_was_found(found):
    evaluation, folder = found
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    text = " ".join(" ".join(page.text).split())
    assert "ablate object dog → cat" in text
    assert f"{100 * evaluation.finding('efficacy').value:.1f}%" in text
    assert "still dog" in text and "lost: now boat" in text and "not selected" in text
    assert page.tags.count("img") == len(re.findall(r"data:image", (folder / "report.html").read_text()))


def test_pictures_before_and_after_are_the_right_ones(found):
    evaluation, folder = found
    text = (folder / "report.html").read_text(encoding="utf-8")
    first = next(p for p in evaluation.pictures if p.seen_before == "dog" and p.seen_after == "cat")
    pattern = rf'<img src="(data:[^"]+)" alt="{re.escape(first.prompt)}, seed {first.seed}, (before|after)">'
    sides = {side: uri for uri, side in re.findall(pattern, text)}
    values = {}
    for side, uri in sides.items():
        data = io.BytesIO(base64.b64decode(uri.partition(",")[2]))
        values[side] = np.asarray(Image.open(data).convert("L")).mean()
    assert values["before"] == pytest.approx(30, abs=3) and values["after"] == pytest.approx(60, abs=3)


def test_the_page_needs_nothing_else_and_runs_nothing(found):
    _, folder = found
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "form", "base"} & set(page.tags)
    assert "http:" not in text and "https:" not in text
    assert all(not name.startswith("on") for name, _ in page.attributes)
    assert all(value.startswith("data:image/") for name, value in page.attributes if name in ("src", "href"))
    policy = re.search(r'content="(default-src[^"]+)"', text)[1]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@pytest.mark.parametrize("payload", PAYLOADS)
def test_names_are_text_and_nothing_else(found, payload):
    evaluation, folder = found
    clean = Page(render_report(renamed(evaluation, "harmless"), Gallery(folder)))
    text = render_report(renamed(evaluation, payload), Gallery(folder))
    page = Page(text)
    assert set(page.tags) == set(clean.tags)
    assert {name for name, _ in page.attributes} == {name for name, _ in clean.attributes}
    assert page.tags.count("style") == 1 and "49" not in re.findall(r"<b>(.*?)</b>", text)
    assert payload in "".join(page.text), "the name is still readable"


@pytest.mark.parametrize("payload", PAYLOADS)
def test_plots_take_any_name(found, payload):
    evaluation = renamed(found[0], payload)
    for plot in (
        rates_plot(evaluation),
        concepts_plot(evaluation.finding("specificity_near").parts),
        clip_plot([p for p in evaluation.pictures if p.group == "everyday"]),
    ):
        root = ElementTree.fromstring(plot)
        assert not [node for node in root.iter() if node.tag.rpartition("}")[2] in ("script", "foreignObject")]


def test_the_same_evaluation_gives_the_same_bytes(found):
    evaluation, folder = found
    assert render_report(evaluation, Gallery(folder)) == render_report(evaluation, Gallery(folder))


def test_verdicts_are_shown(found):
    evaluation, folder = found
    verdicts = judge(evaluation, [Requirement.parse("efficacy>=0.99"), Requirement.parse("specificity_far>=0.1")])
    text = write_report(evaluation, folder, verdicts).read_text(encoding="utf-8")
    assert "efficacy &gt;= 0.99" in text and ">missed<" in text and ">met<" in text


def test_large_noisy_pictures_stay_below_two_megabytes(found):
    """The worst case: pictures that do not compress, and every pair gone wrong."""
    evaluation, _ = found
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8))

    class Noise(Gallery):
        def read(self, name):
            return noise

    pictures = tuple(
        p.model_copy(update={"seen_before": p.name, "seen_after": p.name if p.group == "efficacy" else "other"})
        for p in evaluation.pictures
    )
    text = render_report(evaluation.model_copy(update={"pictures": pictures}), Noise(None))
    assert 500_000 < len(text.encode()) <= MOST_BYTES


def test_no_plot_without_numbers():
    assert concepts_plot([]) is None and clip_plot([]) is None
