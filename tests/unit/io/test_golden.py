"""The file format is a promise: today's code writes and reads the bytes that were committed.

If this fails, either the change was not meant, or the format changed: then raise `FORMAT_VERSION`, keep the old golden
file readable, and add a new one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffedit.delta import Delta, LowRank
from diffedit.io.files import decode_edit, encode_edit, tensors_to_delta
from diffedit.io.lora import kohya_file, peft_files
from diffedit.site import EditSite, Role

GOLDEN = Path(__file__).parents[2] / "golden"


def golden_edit(finish_edit: Any) -> Any:
    """Exact binary fractions and fixed texts: no arithmetic that a machine could do differently."""
    path = "text_model.encoder.layers.0.self_attn.out_proj"
    place = EditSite("text_encoder", path, 0, Role.TEXT_SELF_ATTN_OUT, 2, 3)
    change = LowRank(torch.tensor([[0.5], [-1.25]]), torch.tensor([[1.0, -0.0, 3.0]]))
    request = {
        "subject": "café owl",
        "target": "dog",
        "templates": ("{}", "a {}"),
        "preserve": ("猫",),
        "kind": "object",
    }
    return finish_edit(Delta({place: change}), requests=[request], settings={"lam": 0.1, "note": None})


def test_todays_writer_gives_the_golden_bytes(finish_edit: Any) -> None:
    assert golden_edit(finish_edit).data == (GOLDEN / "edit-1.0.safetensors").read_bytes()


def test_todays_reader_reads_the_golden_bytes() -> None:
    data = (GOLDEN / "edit-1.0.safetensors").read_bytes()
    manifest, tensors = decode_edit(data, "golden")
    (change,) = tensors_to_delta(manifest, tensors).factors.values()
    assert change.dense().tolist() == [[0.5, 0.0, 1.5], [-1.25, 0.0, -3.75]]
    assert manifest.requests[0].subject == "café owl"
    assert manifest.edit_id == (GOLDEN / "edit-1.0.id").read_text().strip()
    assert encode_edit(manifest, tensors) == data


def test_adapters_are_reproducible(finish_edit: Any) -> None:
    """Not golden: balancing goes through LAPACK, which may differ in the last digit from machine to machine."""
    edit = golden_edit(finish_edit)
    assert kohya_file(edit.delta, edit.manifest) == kohya_file(edit.delta, edit.manifest)
    assert peft_files(edit.delta, edit.manifest) == peft_files(edit.delta, edit.manifest)
