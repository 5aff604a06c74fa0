"""The adapters of an edit alone, in a chosen precision, for people who publish or load LoRAs and no more.

Half precision halves the files and costs what `Exported.rounding` says: |change in the files - change of the edit|
over |change of the edit|, measured on what was written. Factors are balanced (`LowRank.compress`) before they are
rounded, which makes that about 3e-8 in float32, 3e-4 in float16 and 2e-3 in bfloat16. The edit file itself stays in
float32 (`Edit.save`): it is what one can check, compose and revert with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from diffedit.delta import Delta
from diffedit.errors import RequestError
from diffedit.io.card import model_card
from diffedit.io.folder import write_file, write_folder
from diffedit.io.lora import KOHYA_FILE, diffusers_file, kohya_file, peft_files, rounding_error
from diffedit.io.manifest import Manifest

Layout = Literal["kohya", "diffusers"]

_CARD = "README.md"
_LAYOUTS = {"kohya": kohya_file, "diffusers": diffusers_file}


@dataclass(frozen=True)
class Exported:
    """What `Edit.export` wrote.

    Attributes:
        path: the folder, or the single file.
        dtype: of the factors, such as "float16".
        rounding: relative error of the whole change by that dtype, Frobenius norm over all sites.
        files: name -> size in bytes.
    """

    path: Path
    dtype: str
    rounding: float
    files: Mapping[str, int]


def export_adapters(
    delta: Delta, manifest: Manifest, path: Path, dtype: torch.dtype, layout: Layout = "kohya"
) -> Exported:
    """Write the adapters as a new folder, or, if the path ends in `.safetensors`, one LoRA file alone.

    Args:
        delta: the change.
        manifest: where base and names come from.
        path: what to make; nothing is ever overwritten.
        dtype: of the factors.
        layout: of a single file: kohya's, which every program reads, or diffusers' own, which diffusers alone reads.

    Raises:
        RequestError: no such layout, or diffusers' layout for a folder.
        UnsupportedModelError: no adapter layout is known for an edited component.
        UnsupportedTensorError: another dtype than float16, bfloat16 or float32.
        SwallowedError, NonFiniteError: `dtype` cannot hold the change.
        OutputExistsError, StorageError: see `diffedit.io.folder`.
    """
    if layout not in _LAYOUTS:
        raise RequestError("there is no such layout", value=repr(layout), hint=f"choose one of {', '.join(_LAYOUTS)}")
    alone = path.suffix == ".safetensors"
    if layout != "kohya" and not alone:
        raise RequestError(
            "a folder of adapters holds kohya's layout",
            value=repr(layout),
            cause="it is the one that every program reads, diffusers included",
            hint="name a .safetensors file for diffusers' own layout",
        )
    adapter = _LAYOUTS[layout](delta, manifest, dtype=dtype)
    rounding, name = rounding_error(delta, dtype), str(dtype).removeprefix("torch.")
    if alone:
        written = write_file(path, adapter)
        return Exported(written, name, rounding, {written.name: len(adapter)})
    files = {KOHYA_FILE: adapter, **peft_files(delta, manifest, dtype=dtype)}
    sentence = (
        f"These adapters hold {name} factors; the change that they make differs from the edit's own (float32) by "
        f"{rounding:.1e} of its size."
    )
    sizes = {file: len(data) for file, data in files.items()}
    files[_CARD] = model_card(manifest, sizes, sentence).encode("utf-8")
    written = write_folder(path, files)
    return Exported(written, name, rounding, {file: len(data) for file, data in files.items()})
