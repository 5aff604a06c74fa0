"""Proves that what an edit says of its pairs is looked at, even where every hash is right."""

from __future__ import annotations

import pytest

from diffedit import Edit, Editor
from diffedit.errors import ArtifactError
from tests.tiny import build
from tests.unit.io.conftest import forge_manifest


@pytest.mark.parametrize("norm", [0.0, -1.0])
def test_a_base_without_any_weight_is_refused(sd1, tmp_path, norm):
    """A share of it would be divided by zero when the edit is composed."""
    edit = Editor(sd1).ablate("dog", target="cat", updater=build.plain())
    path = edit.save(tmp_path / "edit") / "edit.safetensors"
    content = edit.manifest.model_dump(mode="json")
    path.write_bytes(forge_manifest(path.read_bytes(), content))
    assert Edit.load(path).id == edit.id  # the forge itself is good
    for pairs in content["pairs"].values():
        pairs["weight_norm"] = norm
    path.write_bytes(forge_manifest(path.read_bytes(), content))
    with pytest.raises(ArtifactError, match="weight_norm"):
        Edit.load(path)
