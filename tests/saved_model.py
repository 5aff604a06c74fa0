"""A tiny random pipeline on disk with a vocabulary: stands in for a real model where only the machinery matters."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tiny import build

VOCABULARY = {
    "objects": ["dog", "cat", "pig", "house", "tree", "boat"],
    "styles": ["flat"],
    "categories": ["animal", "building"],
    "steps": 2,
    "guidance": 3.0,
    "pixels": 16,
}


def save_tiny_model(folder: Path, scratch: Path) -> Path:
    """Write the pipeline to `folder`; `scratch` is an empty folder for the tokenizer's files."""
    build.pipeline(build.write_tokenizer(scratch)).save_pretrained(folder)
    (folder / "vocabulary.json").write_text(json.dumps(VOCABULARY), encoding="utf-8")
    return folder
