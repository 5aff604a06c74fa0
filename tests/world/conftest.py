"""The bundled model and its judge, loaded once per worker; every test gets the model unedited."""

from __future__ import annotations

import pytest

from diffedit import Editor
from diffedit.evaluate.scorer import Scorer


@pytest.fixture(scope="session")
def world_editor():
    return Editor("builtin:emoji")


@pytest.fixture
def editor(world_editor):
    yield world_editor
    world_editor.revert()


@pytest.fixture(scope="session")
def scorer():
    return Scorer.load("builtin:emoji-scorer")
