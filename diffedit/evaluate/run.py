"""One evaluation from the edit to the files: the same prompts and seeds without and with the edit, judged by pictures.

    with Editor(model):  draw everything before -> apply the edit -> draw everything after -> as it was
    judge:               vectors of all pictures -> names and cosines -> findings

The model is left as it was found. With a folder, every picture is kept as soon as it is drawn; an evaluation that was
interrupted goes on with what is there, and ends with the same numbers.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from diffedit._version import __version__
from diffedit.drawing import first_before_others
from diffedit.edit import Edit
from diffedit.editor import Editor
from diffedit.errors import OutputExistsError, RequestError
from diffedit.evaluate import findings
from diffedit.evaluate.gallery import Gallery, draw, weights_of
from diffedit.evaluate.judge import Detector, Judge, open_judge
from diffedit.evaluate.metrics import Array, mmd, need
from diffedit.evaluate.records import FILE, GROUPS, Concept, Evaluation, Finding, Group, Picture, Settings
from diffedit.evaluate.report import REPORT, render_report
from diffedit.evaluate.suite import Suite, build
from diffedit.io.folder import write_file
from diffedit.provenance import check_base
from diffedit.request import Kind
from diffedit.tracing.run import first_process

_LIBRARIES = ("diffusers", "torch", "transformers")


def evaluate_edit(
    editor: Editor,
    edit: Edit | str | Path,
    *,
    scorer: str | Judge | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Evaluation:
    """Measure what an edit does: efficacy, generality, specificity and fidelity, each with a 95% interval.

    Args:
        editor: the model. All edits in it are taken out meanwhile, and put back in the end.
        edit: an edit, its folder, or "user/name" on the Hub; it need not be in the model.
        scorer: `builtin:emoji-scorer`, folder or Hub id of a transformers `CLIPModel`, or any `Judge`; default: the
            bundled one for a bundled model.
        out: folder for `evaluation.json`, `report.html` and the pictures; an interrupted evaluation with the same
            `out` goes on where it stopped. Default: nothing is written.
        overwrite: replace a finished evaluation in `out`; pictures that are still right are not drawn again.
        batch_size: pictures sampled together.
        progress: called with (pictures done, pictures in all).
        settings: fields of `Settings`, such as images=100, near=["wolf"], seed=7.

    Returns:
        The evaluation. A number that the detector cannot vouch for is `None`, and says why.

    Raises:
        RequestError: a setting is not valid, or there is no scorer for this model.
        OutputExistsError: `out` holds a finished evaluation.
        BaseMismatchError: the edit was made for another base.
        UnsupportedModelError: scipy is missing, or with `out` jinja2 or matplotlib.
    """
    need("scipy", *(() if out is None else ("jinja2", "matplotlib")))
    chosen = make_settings(editor, settings)
    folder = None if out is None else Path(out).expanduser()
    if folder is not None and not overwrite:
        refuse_existing(folder)
    judge = open_judge(scorer, editor.backend.model.source)
    loaded = edit if isinstance(edit, Edit) else Edit.from_pretrained(edit)
    if loaded.id not in editor.ledger.active:
        check_base(loaded.manifest, editor.backend, editor.ledger)  # before minutes of drawing
    suite = build(loaded.requests, editor.vocabulary, judge, chosen)
    gallery = Gallery(folder)
    tell = _counter(2 * len(suite.jobs), progress)
    sampling = {"steps": chosen.steps, "guidance": chosen.guidance}
    with _either_way(editor, loaded) as switch:
        switch(False)
        weights = weights_of(editor)
        first = draw(editor, suite.jobs, "before", weights, gallery, sampling, batch_size, tell)
        switch(True)
        edited = weights_of(editor)
        last = draw(editor, suite.jobs, "after", edited, gallery, sampling, batch_size, tell)
    with first_before_others():  # the others find the vectors that it keeps
        seen = _Seen(judge, suite, gallery, first, last)
    pictures = seen.pictures()
    rates = findings.rates(pictures, suite.preserved, chosen.least_detection)
    found = Evaluation(
        edit_id=loaded.id,
        concepts=tuple(
            Concept(subject=r.subject, action=r.action, kind=r.kind, target=r.target) for r in loaded.requests
        ),
        model=public_name(editor.backend.model.source),
        weights=(weights, edited),
        scorer=judge.name,
        scorer_digest=seen.digest,
        settings=chosen,
        findings=(*rates, findings.becomes_target(rates[0], pictures, suite.targets), *seen.fidelity(pictures)),
        mmd_scale=seen.mmd_scale(),
        pictures=pictures,
        versions={
            "diffedit": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
    )
    if folder is not None and first_process():
        write_file(folder / REPORT, render_report(found, gallery).encode("utf-8"), overwrite=True)
        write_file(folder / FILE, found.to_json(), overwrite=True)  # last: it says that all is there
    return found


def make_settings(editor: Editor, fields: dict[str, Any]) -> Settings:
    """Checked settings, steps and guidance filled in; every complaint is a `RequestError`."""
    own = editor.backend.model.sampling
    try:
        chosen = Settings(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "setting"
        raise RequestError(
            f"the evaluation's setting {where} is not valid", value=repr(first.get("input")), cause=first["msg"]
        ) from error
    sampling = {"steps": chosen.steps or own.steps, "guidance": own.guidance if chosen.guidance is None else None}
    return chosen.model_copy(update={key: value for key, value in sampling.items() if value is not None})


def refuse_existing(folder: Path) -> None:
    """Raise `OutputExistsError` if a finished evaluation is in the folder."""
    if (folder / FILE).exists():
        hint = "choose another folder, or allow overwriting: its pictures are used again"
        raise OutputExistsError("an evaluation is already there", value=repr(str(folder)), hint=hint)


def public_name(source: str) -> str:
    """A model's name without folders of this machine."""
    return Path(source).name if Path(source).exists() else source


@contextmanager
def _either_way(editor: Editor, edit: Edit) -> Iterator[Callable[[bool], None]]:
    """A switch between the unedited model and the model with this edit alone; at the end all edits are as they were."""
    active = editor.edits

    def switch(on: bool) -> None:
        editor.revert()
        if on:
            editor.load(edit)

    try:
        yield switch
    finally:
        editor.revert()
        for other in active:  # in their order, which makes the weights the same to the bit
            editor.load(other)


def _counter(total: int, progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return tell


class _Seen:
    """What the judge makes of the drawn pictures."""

    def __init__(self, judge: Judge, suite: Suite, gallery: Gallery, first: list[str], last: list[str]) -> None:
        self._judge, self._suite, self._first, self._last = judge, suite, first, last
        self.digest = judge.digest()
        self._detectors: dict[Kind, Detector] = {
            space: Detector(judge, captions) for space, captions in suite.labels.items()
        }
        self._rows: dict[Group, list[int]] = {
            group: [i for i, job in enumerate(suite.jobs) if job.group == group] for group in GROUPS
        }
        self._before = {group: self._vectors(gallery, first, rows) for group, rows in self._rows.items() if rows}
        self._after = {group: self._vectors(gallery, last, rows) for group, rows in self._rows.items() if rows}
        self._texts = {
            group: judge.embed_texts([suite.jobs[i].prompt for i in rows]).cpu().double().numpy()
            for group, rows in self._rows.items()
            if rows
        }

    def pictures(self) -> tuple[Picture, ...]:
        """Every pair with its names and cosines, in drawing order."""
        out: dict[int, Picture] = {}
        for group, vectors in self._before.items():
            rows, edited, texts = self._rows[group], self._after[group], self._texts[group]
            names = self._names(rows, vectors), self._names(rows, edited)
            cosines = (vectors * texts).sum(1), (edited * texts).sum(1)
            for k, row in enumerate(rows):
                job = self._suite.jobs[row]
                out[row] = Picture(
                    group=group,
                    name=job.name,
                    kind=job.kind,
                    prompt=job.prompt,
                    seed=job.seed,
                    before=self._first[row],
                    after=self._last[row],
                    seen_before=names[0][k],
                    seen_after=names[1][k],
                    clip_before=float(cosines[0][k]),
                    clip_after=float(cosines[1][k]),
                )
        return tuple(out[row] for row in sorted(out))

    def fidelity(self, pictures: Sequence[Picture]) -> list[Finding]:
        """The findings of the everyday pictures."""
        nothing: Array = np.zeros((0, 1))
        vectors = (kept.get("everyday", nothing) for kept in (self._before, self._after, self._texts))
        return findings.fidelity([picture for picture in pictures if picture.group == "everyday"], *vectors)

    def mmd_scale(self) -> float | None:
        """How far the subject's pictures are from the everyday ones, without the edit."""
        groups = [self._before.get("efficacy"), self._before.get("everyday")]
        found = [vectors for vectors in groups if vectors is not None and len(vectors) > 1]
        return mmd(*found) if len(found) == 2 else None

    def _vectors(self, gallery: Gallery, names: list[str], rows: list[int]) -> Array:
        return gallery.vectors(self._judge, self.digest, [names[i] for i in rows])

    def _names(self, rows: list[int], vectors: Array) -> list[str]:
        """What the detector of each row's kind of concept names it; nothing for everyday pictures."""
        spaces: list[Kind | None] = [
            None if job.group == "everyday" else job.space for job in (self._suite.jobs[i] for i in rows)
        ]
        out = [""] * len(rows)
        for space in sorted({space for space in spaces if space is not None}):
            mine = [k for k, own in enumerate(spaces) if own == space]
            for k, name in zip(mine, self._detectors[space].name(vectors[mine]), strict=True):
                out[k] = self._suite.seen(self._suite.jobs[rows[k]], name)
        return out
