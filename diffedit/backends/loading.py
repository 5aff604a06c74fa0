"""From what the user names a model by to a live pipeline.

A pipeline object is used as it is. `builtin:emoji`, a local folder, a Hub id and a single-file `.safetensors`
checkpoint are loaded by stock diffusers, from safetensors only: a pickle can run code, so it is refused before
anything opens it. Loading is in float32 unless a dtype is named, because half precision rounds small edits away.

Of files, only what reads text is loaded: text encoders, tokenizers, the scheduler's settings. The rest follows by
itself when something looks at it; see `deferred`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from diffedit.backends.deferred import Unread, defer, stamp
from diffedit.backends.deferred import unread as not_read_yet
from diffedit.backends.families import pipeline_class
from diffedit.backends.parts import PICKLES, check_file, check_folder, check_variant, left_out
from diffedit.backends.vocabulary import first_line, read_vocabulary
from diffedit.bundled import BUNDLED, PREFIX, bundled, bundled_name, bundled_variant
from diffedit.errors import DiffEditError, ModelNotFoundError, RequestError, UnsafeFormatError, nearest
from diffedit.interfaces import LoadedModel

_HUB_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


@dataclass(frozen=True)
class Found:
    """Where a named model lies on this machine.

    Attributes:
        path: its folder, or its single file.
        source: a name that says nothing about this machine.
        revision: 40-hex commit when it came from the Hub.
        variant: of a folder, which of its parts' files to take where there is a choice.
    """

    path: Path
    source: str
    revision: str | None = None
    variant: str | None = None


def load_model(
    model: Any,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | None = None,
    config: str | None = None,
    variant: str | None = None,
    text_only: bool = False,
) -> LoadedModel:
    """Whatever names a model -> a live pipeline.

    Args:
        model: a pipeline, `builtin:<name>`, a folder, a `.safetensors` file or a Hub id ("user/name").
        device: moved there after loading; default: where it is.
        dtype: weights are cast to it while loading; default float32. A pipeline object is only cast if it is named.
        revision: branch, tag or commit of a Hub id; the commit it stood for is recorded.
        token: Hub token; default: the one that huggingface_hub finds itself.
        config: for a single-file checkpoint, a folder or Hub id with the configs and the tokenizer; default: diffusers
            recognises the family and fetches them from the Hub.
        variant: of a folder or Hub id, take `model.<variant>.safetensors` for each part that has such a file, and the
            plain file for the others, as diffusers does.
        text_only: leave UNet and VAE out (`None` in the pipeline): enough to run prompts through the text encoder.

    Raises:
        ModelNotFoundError: nothing is there, it has no such variant, or it cannot be loaded.
        RequestError: a variant of something that has none: a pipeline object, a single file.
        UnknownNameError: no built-in model of that name.
        UnsafeFormatError: a pickle.
    """
    if not isinstance(model, str | Path):
        if not hasattr(model, "components"):
            hint = "give a StableDiffusionPipeline, a folder, a .safetensors file, a Hub id or builtin:emoji"
            raise ModelNotFoundError("that is not a model", value=type(model).__name__, hint=hint)
        if variant is not None:
            raise _no_variants(variant, "a pipeline object")
        source = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        return _place(LoadedModel(model, _public_name(str(source))), device, dtype)
    found, kind = locate_model(model, revision=revision, token=token, variant=variant), dtype or torch.float32
    found = replace(found, path=Path(os.path.abspath(found.path)))  # the rest may be read from another working folder
    if found.path.is_dir():
        return _place(_from_folder(found, kind, text_only), device, None)
    return _place(_from_single_file(found, kind, config, text_only), device, None)


def locate_model(
    model: str | Path, *, revision: str | None = None, token: str | None = None, variant: str | None = None
) -> Found:
    """Where the files of a named model lie; opens none of them. A Hub id is fetched into the Hub's cache first.

    Arguments and errors are those of `load_model`.
    """
    name = str(model)
    if name.startswith(PREFIX):
        folder, variant = bundled("model", name), variant or bundled_variant(name)
        return _checked(Found(folder, bundled_name(f"{PREFIX}{folder.name}", variant), None, variant))
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):  # unlike Path.is_dir it also answers for names that no file can have
        return _checked(Found(path, path.resolve().name, None, variant))
    if path.suffix.lower() in PICKLES:
        raise UnsafeFormatError(
            "a pickle checkpoint can run code when it is opened",
            value=repr(path.name),
            hint="get the .safetensors version, or convert it on a machine that you can lose",
        )
    if os.path.isfile(path):
        if variant is not None:
            raise _no_variants(variant, repr(path.name))
        return Found(path, path.name)
    if _HUB_ID.match(name):
        return _from_hub(name, revision, token, variant)
    raise ModelNotFoundError(
        "there is no such model",
        value=repr(name),
        cause="it is no folder, no file, and not of the form user/name",
        hint=nearest(name, [PREFIX + known for known in BUNDLED["model"]]),
    )


def _checked(found: Found) -> Found:
    if found.variant is not None:
        check_variant(found.path, found.variant)
    return found


def _no_variants(variant: str, what: str) -> RequestError:
    hint = "a variant is one of several files for a part, in a folder or on the Hub: leave it out"
    return RequestError(f"{what} has no variants", value=repr(variant), hint=hint)


def _from_folder(found: Found, dtype: torch.dtype, text_only: bool) -> LoadedModel:
    folder = found.path
    if not (folder / "model_index.json").is_file():
        edit = (folder / "edit.safetensors").is_file()
        raise ModelNotFoundError(
            "the folder holds no diffusers pipeline (model_index.json is missing)",
            value=repr(str(folder)),
            cause="it holds an edit" if edit else None,
            hint="load it onto a model with editor.load(folder)"
            if edit
            else "give the folder that save_pretrained() wrote",
        )
    weights = [p for p in folder.rglob("*") if p.suffix.lower() in (*PICKLES, ".safetensors")]
    if weights and all(p.suffix.lower() in PICKLES for p in weights):
        raise UnsafeFormatError(
            "the folder holds its weights as pickles only",
            value=repr(weights[0].name),
            hint="save it again with safe_serialization=True on a machine that you can lose",
        )
    kind, (names, files) = (
        pipeline_class(folder),
        (frozenset(), []) if text_only else check_folder(folder, found.variant),
    )
    options = {"local_files_only": True, "use_safetensors": True, "variant": found.variant}

    def load(kept: Mapping[str, Any]) -> Any:
        return _load(kind.from_pretrained, found, dtype, **options, **kept)

    pipeline = load(left_out(kind) if names or text_only else {})
    if names:
        defer(pipeline, Unread(names, folder, load, stamp(files), found.variant))
    vocabulary, sampling = read_vocabulary(folder, found.variant)
    return LoadedModel(pipeline, found.source, found.revision, vocabulary, sampling, variant=found.variant)


def _from_single_file(found: Found, dtype: torch.dtype, config: str | None, text_only: bool) -> LoadedModel:
    path = found.path
    if path.suffix.lower() != ".safetensors":
        raise UnsafeFormatError(
            "only .safetensors checkpoints are read", value=repr(path.name), hint="convert the file"
        )
    kind, names = pipeline_class(path), frozenset() if text_only else check_file(path, config)
    options = {} if config is None else {"config": os.path.abspath(config) if os.path.isdir(config) else config}

    def load(kept: Mapping[str, Any]) -> Any:
        return _load(kind.from_single_file, found, dtype, **options, **kept)

    pipeline = load(left_out(kind) if names or text_only else {})
    if names:
        defer(pipeline, Unread(names, path, load, stamp([path])))
    return LoadedModel(pipeline, found.source, file=path)


def _from_hub(name: str, revision: str | None, token: str | None, variant: str | None) -> Found:
    from diffusers import StableDiffusionPipeline

    try:
        options = {"revision": revision, "token": token, "variant": variant, "use_safetensors": True}
        folder = Path(StableDiffusionPipeline.download(name, **options))
    except RepositoryNotFoundError as error:
        hint = "check the spelling; a private or gated model needs a token"
        raise ModelNotFoundError(
            "the Hub has no such model, or it is not yours to see", value=repr(name), hint=hint
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ModelNotFoundError(
            "the model cannot be fetched from the Hub, and it is not in the cache",
            value=repr(name),
            cause=first_line(error),
            hint="check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder",
        ) from error
    return _checked(Found(folder, name, folder.name if _COMMIT.match(folder.name) else None, variant))


def _load(loader: Any, found: Found, dtype: torch.dtype, **options: Any) -> Any:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    bars = (diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled())
    level = diffusers_logging.get_verbosity()
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return loader(str(found.path), dtype=dtype, **options)
    except DiffEditError:
        raise
    except Exception as error:  # diffusers raises many types; the user needs one
        raise ModelNotFoundError(
            "the model cannot be loaded",
            value=repr(found.source),
            cause=first_line(error),
            hint="check that all its files are there",
        ) from error
    finally:
        diffusers_logging.set_verbosity(level)
        if bars[0]:
            diffusers_logging.enable_progress_bar()
        if bars[1]:
            transformers_logging.enable_progress_bar()


def _place(loaded: LoadedModel, device: str | torch.device | None, dtype: torch.dtype | None) -> LoadedModel:
    if not_read_yet(loaded.pipeline) is not None:  # what is read later goes where the text encoder is
        for name in ("text_encoder", "text_encoder_2"):
            part = getattr(loaded.pipeline, name, None)
            if part is not None and device is not None:
                part.to(device)
    elif device is not None or dtype is not None:
        loaded.pipeline.to(**{key: value for key, value in (("device", device), ("dtype", dtype)) if value is not None})
    return loaded


def _public_name(source: str) -> str:
    """A name that says nothing about this machine: Hub ids stay, paths lose their folders."""
    return source if _HUB_ID.match(source) and not Path(source).exists() else Path(source).name
