"""Tiny base models on disk, one per family, in the form of the published folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffedit.backends.saving import save_pipeline
from tests.formats.made import single_files
from tests.tiny import build


@pytest.fixture(scope="session")
def bases(tokenizer_folder, tmp_path_factory) -> dict[str, Path]:
    """Folders by family: nested names, old tokenizer files, a licence beside them."""
    root = tmp_path_factory.mktemp("bases")
    for family in ("sd1", "sd2"):
        save_pipeline(build.pipeline(tokenizer_folder, family=family), root / family)
        (root / family / "LICENSE.md").write_text("as is\n", encoding="utf-8")
    return {family: root / family for family in ("sd1", "sd2")}


@pytest.fixture
def base(bases, family) -> Path:
    return bases[family]


@pytest.fixture(scope="session")
def checkpoints(tokenizer_folder, tmp_path_factory) -> dict[str, Path]:
    """Single-file checkpoints by family, each with the text encoder's layout of its family."""
    return single_files(tokenizer_folder, tmp_path_factory.mktemp("checkpoints"))
