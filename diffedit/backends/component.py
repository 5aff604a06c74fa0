"""One component of a pipeline folder, copied with the weights of its live module: only what differs is new.

What was edited is found by comparing, not by asking who edited: a tensor whose live value equals the stored one (up to
the rounding of the narrower dtype, since a float16 file may have been loaded in float32) is untouched. So nothing that
happened to the live module is lost, and nothing else changes. A patched tensor keeps its file, name and dtype.

A component may be stored several times: in shards with an index, as variants (`model.fp16.safetensors`), as pickles.
Complete sets are compared; the one that is closest to the live module is its source. Other sets get the same patches if
they are the same weights in another dtype, and are left out otherwise (EMA copies, pickles): a set that misses the edit
would be picked up by some loader, silently unedited. If the source is a variant with weights of its own, it is written
under the plain names, so that every loader finds it without being told of a variant. (Not shards: those keep theirs.)

A CLIP text encoder stored under flat names, as transformers writes some from 5.6 on, is renamed to the nested names:
older releases would load the flat ones as random weights with no more than a warning.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from diffedit.backends.tensorfile import FLOATS, TensorFile, copy_patched, in_file_dtype, open_tensors, same_values
from diffedit.errors import SwallowedError, UnsupportedTensorError

logger = logging.getLogger("diffedit")

WEIGHTS = frozenset(
    (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5", ".onnx", ".pb", ".ot", ".gguf")
)

_SHARD = r"-\d{5}-of-\d{5}"
_FILE = re.compile(rf"(?P<stem>[a-z_]+)(?:\.(?P<early>\w+))?(?:{_SHARD})?(?:\.(?P<late>\w+))?\.safetensors")
_INDEX = re.compile(r"[a-z_]+\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")
_NESTING = "text_model."
_FLAT = ("embeddings.", "encoder.", "final_layer_norm.")
# Attention layers of VAEs in old files; diffusers renames them while it loads.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class _Set:
    """One complete copy of the component's weights; `variant` is "" for the plain one."""

    variant: str
    files: tuple[TensorFile, ...]
    index: Path | None
    differing: frozenset[str]


def copy_component(module: nn.Module, source: Path, target: Path) -> tuple[str, ...] | None:
    """Copy a component's folder with the module's weights in it.

    Args:
        module: the live module.
        source: its folder in the base pipeline.
        target: where to, not there yet.

    Returns:
        Names in the files of the tensors that got new values, or `None` (and nothing is written) if no stored set of
        weights is that of the module.

    Raises:
        UnsupportedTensorError: an adapter is active, or the weights are on the meta device.
        SwallowedError: the stored dtype cannot hold the change.
        MalformedArtifactError: a weight file is damaged.
    """
    live = _live(module)
    sets = [found for found in (_compare(*group, live) for group in _groups(source)) if found is not None]
    if not sets:
        return None
    main = min(sets, key=lambda found: (len(found.differing), found.variant))
    flat, plain = _is_flat_text_encoder(main), bool(main.variant) and len(main.files) == 1
    if not main.differing and not flat and not plain:
        copy_files(source, target)
        return ()
    target.mkdir()
    names: set[str] = set()
    written: set[Path] = set()
    for found in sets:
        patches = _patches(found, live, main)
        if patches is None:
            continue
        for file, new in patches:
            renamed = {name: nested_name(name) for name in file.entries} if flat else {}
            copy_patched(
                file, target / (_plain_name(file.path) if plain and found is main else file.path.name), new, renamed
            )
            names |= {renamed.get(name, name) for name in new}
        if found.index is not None:
            _copy_index(found.index, target / found.index.name, flat)
        written |= {file.path for file, _ in patches}
    for path in _files(source):
        if (main.differing or plain) and path.suffix.lower() in WEIGHTS and path not in written:
            level = logging.INFO if plain or _is_another_model(path) else logging.WARNING
            logger.log(level, "left out %s/%s: it does not hold the edit", source.name, path.name)
        elif path not in written and not _INDEX.fullmatch(path.name):
            _copy(path, target / path.relative_to(source))
    return tuple(sorted(names))


def holds(module: nn.Module, folder: Path) -> bool:
    """Whether every complete set of weights in a folder is the module's, under names that old libraries read.

    Raises:
        UnsupportedTensorError: an adapter is active, or the weights are on the meta device.
        MalformedArtifactError: a weight file is damaged.
    """
    live = _live(module)
    sets = [found for found in (_compare(*group, live) for group in _groups(folder)) if found is not None]
    return bool(sets) and not any(found.differing or _is_flat_text_encoder(found) for found in sets)


def copy_files(source: Path, target: Path, variant: str | None = None) -> None:
    """Copy a folder's files byte for byte; links are resolved (the Hub's cache consists of them), hidden files not.

    Args:
        source: the folder.
        target: where to, not there yet.
        variant: leave out other weights than that variant's, if the folder has it, and give it the plain name.
    """
    target.mkdir()
    for name, path in copied_names(source, variant).items():
        _copy(path, target / name)


def copied_names(source: Path, variant: str | None) -> dict[Path, Path]:
    """Name in the copy, relative to it -> file of the source; see `copy_files`."""
    files = _files(source)
    own = [path for path in files if variant and _variant_of(path) == variant and path.parent == source]
    if len(own) != 1:
        return {path.relative_to(source): path for path in files}
    kept = [path for path in files if path.suffix.lower() not in WEIGHTS and not _INDEX.fullmatch(path.name)]
    return {Path(_plain_name(own[0])): own[0], **{path.relative_to(source): path for path in kept}}


def nested_name(name: str) -> str:
    """The name that a CLIP text encoder's tensor has in Stable Diffusion's files.

    >>> nested_name("encoder.layers.0.mlp.fc2.weight")
    'text_model.encoder.layers.0.mlp.fc2.weight'
    """
    return _NESTING + name if name.startswith(_FLAT) else name


def _variant_of(path: Path) -> str:
    match = _FILE.fullmatch(path.name)
    return (match["early"] or match["late"] or "") if match else ""


def _plain_name(path: Path) -> str:
    match = _FILE.fullmatch(path.name)
    return f"{match['stem']}.safetensors" if match else path.name


def _is_another_model(path: Path) -> bool:
    """Whether a file is of a variant that knows other things: it has a vocabulary beside the plain one."""
    return (path.parent.parent / f"vocabulary.{_variant_of(path)}.json").is_file()


def _live(module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors under canonical names."""
    if any(hasattr(part, "base_layer") for part in module.modules()):
        raise UnsupportedTensorError(
            "a component with an adapter cannot be saved as a model",
            value=type(module).__name__,
            hint="fuse the adapter, or call unload_lora_weights(), then save",
        )
    state = module.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise UnsupportedTensorError(
            "weights on the meta device cannot be saved",
            value=type(module).__name__,
            hint="load the pipeline without offloading",
        )
    return {_canonical(name): tensor for name, tensor in state.items()}


def _canonical(name: str) -> str:
    """A name in which the layouts of all library versions agree."""
    parts = [part for part in name.split(".") if part not in ("text_model", "vision_model")]
    if "attentions" in parts and len(parts) > 1:
        parts[-2] = _OLD_ATTENTION.get(parts[-2], parts[-2])
    return ".".join(parts)


def _groups(folder: Path) -> list[tuple[str, tuple[TensorFile, ...], Path | None]]:
    """The safetensors files of a folder by variant, with the index of sharded ones."""
    files: dict[str, list[TensorFile]] = {}
    indices: dict[str, Path] = {}
    for path in _files(folder):
        if path.parent != folder:
            continue
        if match := _FILE.fullmatch(path.name):
            files.setdefault(match["early"] or match["late"] or "", []).append(open_tensors(path))
        elif match := _INDEX.fullmatch(path.name):
            indices[match["variant"] or ""] = path
    return [(variant, tuple(found), indices.get(variant)) for variant, found in sorted(files.items())]


def _compare(
    variant: str, files: tuple[TensorFile, ...], index: Path | None, live: Mapping[str, Tensor]
) -> _Set | None:
    """Which tensors differ, or `None` if these files do not hold this module."""
    stored = [(_canonical(name), name, file) for file in files for name in file.entries]
    names = [canonical for canonical, _, _ in stored]
    if len(set(names)) < len(names) or not live.keys() <= set(names):
        return None
    differing = set()
    for canonical, name, file in stored:
        entry = file.entries[name]
        if canonical not in live or entry.dtype not in FLOATS:
            continue
        if tuple(live[canonical].shape) != entry.shape:
            return None
        if not same_values(live[canonical], file.read(name)):
            differing.add(canonical)
    return _Set(variant, files, index, frozenset(differing))


def _is_flat_text_encoder(main: _Set) -> bool:
    names = {name for file in main.files for name in file.entries}
    return {"embeddings.token_embedding.weight", "final_layer_norm.weight"} <= names


def _patches(found: _Set, live: Mapping[str, Tensor], main: _Set) -> list[tuple[TensorFile, dict[str, Tensor]]] | None:
    """New values per file, or `None` for a set that cannot carry them and is left out."""
    if not found.differing <= main.differing:
        return None
    try:
        return [
            (
                file,
                {
                    name: in_file_dtype(name, live[_canonical(name)], file.read(name))
                    for name in file.entries
                    if _canonical(name) in main.differing
                },
            )
            for file in found.files
        ]
    except SwallowedError:
        if found is main:
            raise
        return None


def _copy_index(source: Path, target: Path, flat: bool) -> None:
    if not flat:
        _copy(source, target)
        return
    index = json.loads(source.read_text(encoding="utf-8"))
    index["weight_map"] = {nested_name(name): file for name, file in index["weight_map"].items()}
    target.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
