"""Real edits of a tiny random pipeline, made once: what the file tests save, kill, copy and compare."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from diffedit import Editor
from diffedit.edit import Edit
from diffedit.updaters.closed_form import QuickFix
from tests.tiny import build

SUBJECTS = ("dog", "fox", "cat", "owl", "bee", "ant", "hen", "cow", "pig", "bat")
# One template only: three rows or so per subject, so that several edits have keys to spare in 32 dimensions.
TEMPLATES = ("a {}", "the {}")


@cache
def _tokenizer() -> Path:
    return build.write_tokenizer(Path(tempfile.mkdtemp(prefix="tokenizer-")))


def pipeline(dtype: torch.dtype = torch.float32) -> Any:
    """A tiny Stable Diffusion 1.x pipeline, always with the same weights."""
    pipe = build.pipeline(_tokenizer(), family="sd1", layout="flat")
    return pipe if dtype is torch.float32 else pipe.to(dtype)


@cache
def edits(count: int, dtype: torch.dtype = torch.float32) -> tuple[Edit, ...]:
    """`count` edits of different subjects, each solved on the unedited pipeline and in no model any more."""
    editor = Editor(pipeline(dtype))
    made = []
    for subject in SUBJECTS[:count]:
        edit = editor.ablate(subject, target="tree", templates=TEMPLATES, preserve=["sun"], updater=QuickFix(lam=0.01))
        edit.revert()
        made.append(Edit(edit.manifest, edit.delta))
    return tuple(made)
