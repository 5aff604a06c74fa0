"""Writing a whole pipeline so that old and new loaders read it.

A pipeline that came from a folder (one of this machine, or the Hub's cache) is written as that folder with the edits in
it: every file is copied byte for byte, except that in the weight files of a touched component the touched tensors are
new; see `component`. Components that were never read (see `deferred`) are copied unread. What cannot be copied because
the live pipeline has something else there (another scheduler, other tokens) is written anew. A pipeline that came from
nowhere is written whole.

`save_pretrained` alone is not enough for that: from transformers 5.6 on it may write the text encoder under flat names,
which older releases load as *random weights* with no more than a warning, and it writes the tokenizer as
`tokenizer.json` only, which their slow tokenizer cannot read. So the text encoder is written under the nested names
that all published Stable Diffusion folders use, and `vocab.json` and `merges.txt` are written beside the tokenizer.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffedit.backends.component import WEIGHTS, copy_component, copy_files, nested_name
from diffedit.backends.deferred import complete, in_memory, unread
from diffedit.backends.publish import new_folder
from diffedit.backends.vocabulary import VOCABULARY, vocabulary_file
from diffedit.errors import UnsupportedModelError, UnsupportedTensorError

logger = logging.getLogger("diffedit")

INDEX = "model_index.json"
_TOKENIZER_FILES = ("vocab.json", "merges.txt")


def save_pipeline(pipeline: Any, path: Path, *, overwrite: bool = False, variant: str | None = None) -> Path:
    """Write the pipeline as a folder that stock diffusers loads; it appears complete or not at all.

    Args:
        pipeline: a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`.
        path: the folder to make.
        overwrite: replace a pipeline folder (one with `model_index.json`) that is already there.
        variant: of the folder, the one that the pipeline was loaded from; it becomes the plain one.

    Raises:
        OutputExistsError: something is there that may not be replaced.
        UnsupportedModelError: it has no UNet or no VAE.
        UnsupportedTensorError: an adapter is active, or weights are not in memory.
        SwallowedError: the dtype of the base's files cannot hold the edit.
        StorageError: the file system refused; what was there is there still.
    """
    path = Path(os.path.abspath(path))
    waiting = unread(pipeline)
    if waiting is not None and not waiting.source.is_dir():  # the rest of a single file has to be converted
        waiting, pipeline = None, complete(pipeline)
    still = waiting.names if waiting is not None else frozenset()
    for name in ("unet", "vae"):
        if name not in still and getattr(pipeline, name, None) is None:
            hint = "load the whole model, then save"
            raise UnsupportedModelError(
                "a pipeline without all its parts cannot be saved", value=f"no {name}", hint=hint
            )
    components = in_memory(pipeline)
    for name, component in components.items():
        if isinstance(component, nn.Module) and any(hasattr(part, "base_layer") for part in component.modules()):
            raise UnsupportedTensorError(
                "a pipeline with an active adapter cannot be saved as a model",
                value=name,
                hint="call fuse_lora() and unload_lora_weights(), or only the latter, then save",
            )
    source = source_folder(pipeline) if waiting is None else waiting.source
    with new_folder(path, replaceable=INDEX if overwrite else None) as fresh:
        if source is None:
            pipeline.save_pretrained(fresh)
            for name, component in components.items():
                _write_readably(name, component, fresh / name)
        else:
            _copy_pipeline(pipeline, components, source, fresh, variant)
            if waiting is not None:  # what was never read was never changed
                waiting.check()
                for name in sorted(still):
                    copy_files(source / name, fresh / name, variant)
    return path


def source_folder(pipeline: Any) -> Path | None:
    """The local folder that the pipeline was loaded from, the Hub's cache included; `None` if there is none."""
    names = [getattr(pipeline, "config", {}).get("_name_or_path")]
    for part in ("unet", "text_encoder"):
        config = getattr(getattr(pipeline, part, None), "config", None)
        name = config.get("_name_or_path") if isinstance(config, dict) else getattr(config, "_name_or_path", None)
        names.append(os.path.dirname(name) if isinstance(name, str) and os.path.basename(name) == part else None)
    for name in names:
        if isinstance(name, str) and name and os.path.isfile(os.path.join(name, INDEX)):
            return Path(os.path.abspath(name))
    return None


def loose_files(source: Path, variant: str | None) -> dict[str, Path]:
    """Name in the copy -> file, of what a copy takes over from beside a pipeline's components.

    A variant's own vocabulary takes the place of the plain one.
    """
    found = {
        path.name: path
        for path in sorted(source.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.suffix.lower() not in WEIGHTS
    }
    own = vocabulary_file(source, variant)
    if own.name in found and own.name != VOCABULARY:
        found[VOCABULARY] = found.pop(own.name)
    return found


def _copy_pipeline(
    pipeline: Any, components: Mapping[str, Any], source: Path, fresh: Path, variant: str | None
) -> None:
    stored = json.loads((source / INDEX).read_text(encoding="utf-8"))
    described = True  # whether the base's own index still tells the truth
    for name, component in components.items():
        entry = stored.get(name)
        described &= (component is None) == (not isinstance(entry, list) or entry[1] is None)
        if component is not None and not _copied(name, component, entry, source / name, fresh / name):
            logger.info("%s is not that of %s; writing it anew", name, source.name)
            shutil.rmtree(fresh / name, ignore_errors=True)
            component.save_pretrained(fresh / name)
            _write_readably(name, component, fresh / name)
            described &= isinstance(entry, list) and entry[1] == type(component).__name__
    for file, path in loose_files(source, variant).items():
        if file != INDEX or described:
            shutil.copyfile(path, fresh / file)
    if not described:
        pipeline.save_config(fresh)


def _copied(name: str, component: Any, entry: Any, source: Path, target: Path) -> bool:
    """Copy the component's folder if the live component is what is stored there, edits of its weights aside."""
    if not source.is_dir():
        return False
    if isinstance(component, nn.Module):
        changed = copy_component(component, source, target)
        for tensor in changed or ():
            logger.info("changed %s/%s", name, tensor)
        return changed is not None
    if hasattr(component, "get_vocab"):
        if not _same_tokenizer(component, source):
            return False
        copy_files(source, target)
        if not all((target / file).is_file() for file in _TOKENIZER_FILES):
            _write_readably(name, component, target)
        return True
    if hasattr(component, "init_noise_sigma"):  # a scheduler
        if not (isinstance(entry, list) and entry[1] == type(component).__name__ and _same_config(component, source)):
            return False
    copy_files(source, target)
    return True


def _same_tokenizer(tokenizer: Any, folder: Path) -> bool:
    try:
        other = type(tokenizer).from_pretrained(folder, local_files_only=True)
    except Exception:  # the libraries raise many types; whatever it is, the folder is not what is live
        return False
    keys = ("special_tokens_map", "model_max_length")
    return bool(tokenizer.get_vocab() == other.get_vocab()) and all(
        getattr(tokenizer, key) == getattr(other, key) for key in keys
    )


def _same_config(scheduler: Any, folder: Path) -> bool:
    try:
        other = type(scheduler).from_pretrained(folder, local_files_only=True)
    except Exception:  # the libraries raise many types; whatever it is, the folder is not what is live
        return False
    mine, theirs = ({k: v for k, v in dict(s.config).items() if not k.startswith("_")} for s in (scheduler, other))
    return bool(mine == theirs)


def _write_readably(name: str, component: Any, folder: Path) -> None:
    """Mend what `save_pretrained` wrote: nested names for the text encoder, old files for the tokenizer."""
    if name.startswith("text_encoder") and not hasattr(component, "text_model"):
        nested = {nested_name(key): value.contiguous() for key, value in component.state_dict().items()}
        shutil.rmtree(folder)
        component.save_pretrained(folder, state_dict=nested)
    backend = getattr(component, "backend_tokenizer", None)
    if backend is not None:
        backend.model.save(str(folder))
