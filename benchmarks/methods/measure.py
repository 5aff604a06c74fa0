"""One cell: edit, draw the same prompts and seeds without and with the edit, judge, count.

Drawing, judging and counting are those of `diffedit evaluate`; what is new is that the unedited pictures are drawn once
for all methods and kept in the run's folder. An edit that diffedit refuses is a result, not a failure: its record says
why.

Facts are measured on `builtin:emoji-facts`, which shares all but its text encoder with `builtin:emoji`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.methods.concepts import COLOURS, colour_target, colour_templates, fact_target
from benchmarks.methods.plan import BEFORE, DEFAULT, SINGLE, Cell, Record
from benchmarks.methods.scenes import COLOUR, name_colour, scene
from benchmarks.methods.table import METHODS, describe
from diffedit import Editor, registry
from diffedit.edit import EDIT_FILE, LORA_FILE, Edit
from diffedit.errors import DiffEditError
from diffedit.evaluate import findings
from diffedit.evaluate.gallery import Gallery, Side, draw, weights_of
from diffedit.evaluate.judge import Detector
from diffedit.evaluate.metrics import Array
from diffedit.evaluate.records import Picture
from diffedit.evaluate.scorer import Scorer
from diffedit.evaluate.suite import Suite
from diffedit.interfaces import Locator, Updater
from diffedit.io.folder import write_file
from diffedit.locators.cross_attention import CrossAttentionLocator
from diffedit.locators.locogen import LocoGen
from diffedit.updaters.closed_form import QuickFix

MODEL, FACTS_MODEL, JUDGE = "builtin:emoji", "builtin:emoji-facts", "builtin:emoji-scorer"
FACT = "fact"
_Seen = tuple[list[str], Array, list[str]]
STRIP = ("efficacy", "efficacy", "generality", "near", "far")
_LOCATED = "located"


class World:
    """The model, its judge, and what is kept between cells.

    Args:
        folder: of the run.
        batch_size: pictures sampled together.
    """

    def __init__(self, folder: Path, batch_size: int = 32) -> None:
        self._models: dict[str, tuple[Editor, str]] = {}
        self.editor, self._weights = self._open(MODEL)
        self.judge = Scorer.load(JUDGE)
        self.folder = folder
        self._digest = self.judge.digest()
        self._kept = Gallery(folder / "unedited")
        self._batch = batch_size

    def use(self, cell: Cell) -> None:
        """Make `editor` that of the model which the cell is about, unedited."""
        self.editor.revert()
        self.editor, self._weights = self._open(FACTS_MODEL if cell.kind == FACT else MODEL)

    def _open(self, name: str) -> tuple[Editor, str]:
        """The model and the digest of its weights."""
        if name not in self._models:
            editor = Editor(name)
            editor.pipeline.unet.to(memory_format=torch.channels_last)  # the same pictures, an eighth sooner
            self._models[name] = editor, weights_of(editor)
        return self._models[name]

    def run(self, cell: Cell) -> Record:
        """The record of a cell with pictures."""
        record: Record = {"cell": asdict(cell), "label": describe(cell.setting), "refused": None}
        self.use(cell)
        if cell.role == BEFORE:  # what is drawn depends on the requests alone, which any method completes alike
            requests = self.edit(replace(cell, method="quickfix-bare"), QuickFix(), None).requests
            self.editor.revert()
            suite = scene(cell, requests, self.editor.vocabulary, self.judge)
            self._look(suite, "before", self._kept, self._weights)
            return record | {"pictures": len(suite.jobs)}
        try:
            edit, seconds = self._edit(cell)
            record["edit"] = facts(edit, seconds)
        except DiffEditError as error:
            self.editor.revert()
            return record | {"refused": f"{type(error).__name__}: {error}"}
        try:
            return record | self._judged(cell, edit)
        finally:
            self.editor.revert()

    def edit(self, cell: Cell, updater: Updater, locator: Locator | None) -> Edit:
        """Make an edit, which is then in the model."""
        method, kind = METHODS[cell.method], cell.kind
        said: dict[str, Any] = {"updater": updater, "locator": locator}
        said["preserve"] = None if method.preserve else ()
        if kind == FACT:  # an update but for its name, which methods that erase would refuse
            subject = cell.concepts[0]
            return self.editor.ablate(subject, target=fact_target(subject), kind="object", **said)
        if kind != COLOUR:
            return self.editor.ablate(list(cell.concepts), kind=kind, **said)
        colour = cell.concepts[0]
        if method.preserve and updater.preserves:
            said["preserve"] = [name for name in COLOURS if name != colour]
        return self.editor.ablate(
            colour, target=colour_target(colour), templates=colour_templates(), kind="object", **said
        )

    def _edit(self, cell: Cell) -> tuple[Edit, float]:
        """The cell's edit and its seconds, finding the place included."""
        method = METHODS[cell.method]
        fields = registry.get("updaters", method.updater).model_fields
        more = {"cache_dir": self.folder / "moments"} if "cache_dir" in fields else {}  # second moments, by content
        updater, locator = method.build(cell.setting, **more)
        spent = 0.0
        if locator is None and updater.locator == LocoGen.name:
            locator, spent = self._window(cell, updater)
        start = time.perf_counter()
        edit = self.edit(cell, updater, locator)
        return edit, spent + time.perf_counter() - start

    def _window(self, cell: Cell, updater: Updater) -> tuple[Locator, float]:
        """LocoGen's window, which no setting of the updater changes: measured once per concept."""
        name = hashlib.sha256(json.dumps([cell.kind, cell.concepts]).encode()).hexdigest()[:16]
        path = self.folder / _LOCATED / f"{name}.json"
        if not path.is_file():
            start = time.perf_counter()
            edit = self.edit(cell, updater, None)
            seconds = time.perf_counter() - start
            self.editor.revert()
            layers = [site.layer for site in edit.delta.sites]
            found = {"first": min(layers), "last": max(layers), "seconds": seconds}
            write_file(path, json.dumps(found).encode(), overwrite=True)
        kept = json.loads(path.read_bytes())
        return CrossAttentionLocator(first=kept["first"], last=kept["last"]), kept["seconds"]

    def _judged(self, cell: Cell, edit: Edit) -> Record:
        suite = scene(cell, edit.requests, self.editor.vocabulary, self.judge)
        fresh = Gallery(None)
        last = self._look(suite, "after", fresh, edit.id)
        self.editor.revert()
        first = self._look(suite, "before", self._kept, self._weights)
        texts: Array = self.judge.embed_texts([job.prompt for job in suite.jobs]).double().numpy()
        pictures = _pictures(suite, first, last, texts)
        rates = findings.rates(pictures, frozenset(), 0.7)
        rows = [
            {
                "group": {"specificity_near": "near", "specificity_far": "far"}.get(found.name, found.name),
                "name": part.name,
                "kind": part.kind,
                "n": part.before.n,
                "before": part.before.hits,
                "after": part.after.hits,
                "kept": part.kept.hits,
            }
            for found in rates
            for part in found.parts
        ]
        become = findings.becomes_target(rates[0], pictures, suite.targets)
        everyday = [i for i, job in enumerate(suite.jobs) if job.group == "everyday"]
        vectors = (found[everyday] for found in (first[1], last[1], texts))
        mmd, clip = findings.fidelity([pictures[i] for i in everyday], *vectors)
        if cell.part in SINGLE and cell.role == DEFAULT:
            self._strip(cell, suite, first[0], last[0], fresh)
        return {
            "rows": rows,
            "becomes": None if become.value is None else {"hits": round(become.value * become.n), "n": become.n},
            "fidelity_mmd": mmd.value,
            "fidelity_clip": clip.value,
            "pictures": len(pictures),
        }

    def _look(self, suite: Suite, side: Side, gallery: Gallery, weights: str) -> _Seen:
        """Draw what is missing: the pictures' files, their vectors [n, d], and what each is named."""
        own = self.editor.backend.model.sampling
        sampling = {"steps": own.steps, "guidance": own.guidance}
        files = draw(self.editor, suite.jobs, side, weights, gallery, sampling, self._batch, lambda _: None)
        vectors = gallery.vectors(self.judge, self._digest, files)
        names = [""] * len(files)
        for space in dict.fromkeys(job.space for job in suite.jobs if job.group != "everyday"):
            rows = [i for i, job in enumerate(suite.jobs) if job.space == space and job.group != "everyday"]
            if space in suite.labels:
                seen: Sequence[str] = Detector(self.judge, suite.labels[space]).name(vectors[rows])
            else:
                seen = [name_colour(gallery.read(files[i])) for i in rows]
            for row, name in zip(rows, seen, strict=True):
                names[row] = suite.seen(suite.jobs[row], name)
        return files, vectors, names

    def _strip(self, cell: Cell, suite: Suite, first: list[str], last: list[str], fresh: Gallery) -> None:
        """Keep a few pictures side by side, one strip per method and one of the unedited model."""
        chosen: list[int] = []
        for group in STRIP:
            chosen += [i for i, job in enumerate(suite.jobs) if job.group == group and i not in chosen][:1]
        for name, files, gallery in ((cell.method, last, fresh), ("unedited", first, self._kept)):
            images = [gallery.read(files[i]) for i in chosen]
            strip = Image.new("RGB", (sum(image.width for image in images), images[0].height))
            for k, image in enumerate(images):
                strip.paste(image, (k * image.width, 0))
            path = self.folder / "strips" / f"{cell.part}-{cell.concepts[0].replace(' ', '-')}-{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}-{time.monotonic_ns()}.png")
            strip.save(temporary)
            temporary.replace(path)


def facts(edit: Edit, seconds: float) -> Record:
    """What an edit is made of and what it cost."""
    files = edit.files()
    return {
        "seconds": seconds,
        "target": [request.target for request in edit.requests][:1],
        "sites": len(edit.delta.sites),
        "rank": max(change.rank for change in edit.delta.factors.values()),
        "bytes": len(files[EDIT_FILE]),
        "lora_bytes": len(files[LORA_FILE]),
        "folder_bytes": sum(len(data) for data in files.values()),
    }


def _pictures(suite: Suite, first: _Seen, last: _Seen, texts: Array) -> list[Picture]:
    """The pairs; `_Seen` holds files, vectors [n, d] and names, and `texts` the prompts' vectors [n, d]."""
    cosines = [(vectors * texts).sum(1) for _, vectors, _ in (first, last)]
    return [
        Picture(
            group=job.group,
            name=job.name,
            kind=job.kind,
            prompt=job.prompt,
            seed=job.seed,
            before=first[0][i],
            after=last[0][i],
            seen_before=first[2][i],
            seen_after=last[2][i],
            clip_before=float(cosines[0][i]),
            clip_after=float(cosines[1][i]),
        )
        for i, job in enumerate(suite.jobs)
    ]
