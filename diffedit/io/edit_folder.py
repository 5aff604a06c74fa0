"""What an edit's folder holds, made from an edit and read back: the one list of its files.

edit.safetensors, pytorch_lora_weights.safetensors, PEFT's files     always
pairs.safetensors                                                    if the edit knows what it was solved from
measured.json                                                        if somebody measured it
README.md                                                            always, and made from the others
"""

from __future__ import annotations

import logging
from pathlib import Path

from diffedit.delta import Delta
from diffedit.io.card import model_card
from diffedit.io.files import EDIT_FILE, decode_edit, delta_to_tensors, encode_edit, read_bytes, tensors_to_delta
from diffedit.io.lora import KOHYA_FILE, kohya_file, peft_files
from diffedit.io.manifest import Manifest
from diffedit.io.measured import MEASURED_FILE, Measured, decode_measured
from diffedit.io.pairs import PAIRS_FILE, decode_pairs, pairs_file

CARD_FILE = "README.md"

logger = logging.getLogger("diffedit")


def edit_files(manifest: Manifest, delta: Delta, measured: Measured | None = None) -> dict[str, bytes]:
    """The folder's files in memory, by name; the same edit with the same measurements gives the same bytes."""
    out = {
        EDIT_FILE: encode_edit(manifest, delta_to_tensors(delta)),
        KOHYA_FILE: kohya_file(delta, manifest),
        **peft_files(delta, manifest),
    }
    if delta.pairs:
        out[PAIRS_FILE] = pairs_file(delta.pairs, manifest)
    if measured is not None:
        out[MEASURED_FILE] = measured.to_json()
    sizes = {name: len(data) for name, data in out.items()}
    card = model_card(manifest, sizes, metrics=measured.metrics if measured else ())
    return {**out, CARD_FILE: card.encode("utf-8")}


def read_folder(path: Path) -> tuple[Manifest, Delta, Measured | None]:
    """An edit with its pairs and measurements, from its folder or its `edit.safetensors`, as one save left them.

    Measurements of another edit are left out, with a warning.

    Raises:
        ArtifactError: see `read_edit`, `decode_pairs` and `decode_measured`.
    """
    file, data, beside = read_bytes(path, (PAIRS_FILE, MEASURED_FILE))
    manifest, tensors = decode_edit(data, str(file))
    pairs, measured = {}, None
    if manifest.pairs and PAIRS_FILE in beside:
        pairs = decode_pairs(beside[PAIRS_FILE], manifest, str(file.parent / PAIRS_FILE))
    if MEASURED_FILE in beside:
        measured = decode_measured(beside[MEASURED_FILE], str(file.parent / MEASURED_FILE))
        if measured.edit_id != manifest.edit_id:
            logger.warning("left out %s: it is about edit %s", file.parent / MEASURED_FILE, measured.edit_id[:12])
            measured = None
    return manifest, Delta(tensors_to_delta(manifest, tensors).factors, {}, pairs), measured
