"""Writing a whole pipeline so that old and new loaders read it.

`save_pretrained` alone is not enough: from transformers 5.6 on it may write the text encoder under flat names, which
older releases load as *random weights* with no more than a warning, and it writes the tokenizer as `tokenizer.json`
only, which their slow tokenizer cannot read. So the text encoder is written under the nested names that all published
Stable Diffusion folders use, and `vocab.json` and `merges.txt` are written beside it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from diffedit.errors import OutputExistsError, StorageError


def save_pipeline(pipeline: Any, path: Path, *, overwrite: bool = False) -> Path:
    """Write the pipeline into a temporary folder beside `path`, then rename it into place.

    Args:
        pipeline: a `StableDiffusionPipeline`.
        path: the folder to make.
        overwrite: replace a pipeline folder (one with `model_index.json`) that is already there.

    Raises:
        OutputExistsError: something is there that may not be replaced.
        StorageError: the file system refused; what was there is there still.
    """
    path = path.absolute()
    if os.path.lexists(path) and not (overwrite and (path / "model_index.json").is_file() and not path.is_symlink()):
        hint = "choose another path" if overwrite else "choose another path, or allow overwriting a pipeline folder"
        raise OutputExistsError("the output is already there", value=repr(str(path)), hint=hint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
            fresh = Path(temporary) / "new"
            _write(pipeline, fresh)
            if path.exists():
                os.rename(path, Path(temporary) / "old")
            os.rename(fresh, path)
    except OSError as error:
        cause, hint = str(error), "check space and permissions"
        raise StorageError("the pipeline cannot be written", value=repr(str(path)), cause=cause, hint=hint) from error
    return path


def _write(pipeline: Any, folder: Path) -> None:
    pipeline.save_pretrained(folder)
    encoder = pipeline.text_encoder
    if not hasattr(encoder, "text_model"):
        nested = {f"text_model.{key}": value.contiguous() for key, value in encoder.state_dict().items()}
        shutil.rmtree(folder / "text_encoder")
        encoder.save_pretrained(folder / "text_encoder", state_dict=nested)
    backend = getattr(pipeline.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.model.save(str(folder / "tokenizer"))
