"""What an "erased" model really changed: two models on disk, compared tensor by tensor.

    diff("runwayml/stable-diffusion-v1-5", "erased.safetensors").summary()

Both sides are matched by canonical names (`audit.layouts`), read one tensor at a time (memory: a few copies of the
largest tensor), measured (`audit.measure`), and what cannot be matched is listed, not skipped. Then the words are run
through the base's text encoder (`audit.words`), and the pattern is named (`audit.guess`). Neither model is loaded as a
pipeline for the comparison; for the words the base's text encoder alone is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffedit.audit.guess import guess, shared_inputs
from diffedit.audit.measure import Change, compare
from diffedit.audit.records import ModelDiff, NotCompared, TensorDiff
from diffedit.audit.weights import Weights
from diffedit.audit.words import clean_words, rank_words, reachable
from diffedit.backends.loading import Found, locate_model
from diffedit.errors import DiffEditError, ModelNotFoundError, UnsupportedModelError
from diffedit.preparing import choose_backend
from diffedit.targets import general_nouns

_CROSS = re.compile(r"unet\..+\.attn2\.to_[kv]\.weight")


def diff(
    base: str | Path,
    edited: str | Path,
    *,
    words: Sequence[str] | None = None,
    more_words: Sequence[str] = (),
    config: str | Path | None = None,
    base_revision: str | None = None,
    edited_revision: str | None = None,
    token: str | None = None,
) -> ModelDiff:
    """Compare two models on disk: which weights differ, how, and which words that moves.

    Args:
        base: the model to start from: a diffusers folder, a `.safetensors` checkpoint, `builtin:emoji` or a Hub id.
        edited: the model to look at, likewise; a file with some of the weights will do.
        words: the words to run; default: what the base's vocabulary lists, else general nouns. An empty list runs none.
        more_words: words to run besides.
        config: for a single-file base, a folder or Hub id with its configs and tokenizer, needed to run words; default:
            the edited model if that is a folder, else diffusers fetches them from the Hub.
        base_revision: branch, tag or commit of a Hub id.
        edited_revision: likewise.
        token: Hub token.

    Raises:
        ModelNotFoundError: one of the models is not there, or holds no weights.
        UnsafeFormatError: a pickle.
        MalformedArtifactError: a damaged file.
        StorageError: the file system refused.
        UnsupportedModelError: the two have no tensor in common.
        RequestError: a word that no prompt can hold.
    """
    more = clean_words(more_words)
    chosen = None if words is None else clean_words(words)
    places = _locate(base, base_revision, token), _locate(edited, edited_revision, token)
    with Weights(places[0].path, places[0].variant) as one, Weights(places[1].path, places[1].variant) as other:
        common = [name for name in one.names if name in other]
        if not common:
            raise UnsupportedModelError(
                "the two models have no tensor in common",
                value=f"{places[0].source} has {one.names[0]!a}, {places[1].source} has {other.names[0]!a}",
                hint="compare two models of one family",
            )
        reshaped = tuple(name for name in common if one.shape(name) != other.shape(name))
        odd = {name for name in common if not (one.readable(name) and other.readable(name))}
        pairs = [name for name in common if name not in reshaped and name not in odd]
        found, inputs = _measure(one, other, pairs)
        shared = shared_inputs(inputs)
        cross = sum(1 for name in one.names if _CROSS.fullmatch(name))
        said = guess(found, compared=len(pairs), cross_layers=cross, shared=shared)
        if reshaped:
            said = (f"The models have different architectures: {len(reshaped)} tensors have other shapes.", *said)
        run = _words(places, (one, other), found, chosen, more, config, token)
        only = _without(one.names, other), _without(other.names, one)
        return ModelDiff(
            base=places[0].source,
            edited=places[1].source,
            compared=len(pairs),
            identical=len(pairs) - len(found),
            tensors=tuple(sorted(found, key=lambda tensor: (-(tensor.relative_norm or 0.0), tensor.name))),
            only_base=only[0],
            only_edited=only[1],
            reshaped=reshaped,
            not_compared=_not_compared(places, (one, other), only, reshaped, odd),
            guess=said[0],
            evidence=said[1:],
            differs=bool(reshaped) or any(item.state != "rounding" for item in found) or _lacking(one, other, only),
            **run,
        )


def _locate(model: Any, revision: str | None, token: str | None) -> Found:
    if not isinstance(model, str | Path):
        hint = "save the pipeline first; models are compared as files"
        raise ModelNotFoundError("a model is named by a path or an id", value=type(model).__name__, hint=hint)
    return locate_model(model, revision=revision, token=token)


def _measure(one: Weights, other: Weights, names: Sequence[str]) -> tuple[list[TensorDiff], list[Any]]:
    found, inputs = [], []
    for name in names:
        if one.dtype(name) == other.dtype(name) and one.raw(name) == other.raw(name):
            continue
        crossing = _CROSS.fullmatch(name) is not None
        change = compare(one.tensor(name), other.tensor(name), want_inputs=crossing)
        if change is None:
            continue
        found.append(_record(name, one, other, change))
        if change.inputs is not None:
            inputs.append(change.inputs)
    return found, inputs


def _record(name: str, one: Weights, other: Weights, change: Change) -> TensorDiff:
    shape = one.shape(name)
    columns = 1
    for extent in shape[1:]:
        columns *= extent
    return TensorDiff(
        name=name,
        state=change.state,
        shape=shape,
        base_dtype=one.dtype(name),
        edited_dtype=other.dtype(name),
        norm=change.norm,
        relative_norm=change.relative_norm,
        rows=change.rows,
        rank=change.rank,
        rank_is_bound=change.rank_is_bound,
        full_rank=min(shape[0], columns) if len(shape) > 1 else None,
        noise_floor=change.floor,
        singular_values=change.singular_values,
    )


def _words(
    places: tuple[Found, Found],
    weights: tuple[Weights, Weights],
    found: Sequence[TensorDiff],
    chosen: tuple[str, ...] | None,
    more: tuple[str, ...],
    config: str | Path | None,
    token: str | None,
) -> dict[str, Any]:
    """The word tables as fields of `ModelDiff`; a base that cannot be run is a note, not an error."""
    layers = [item.name for item in found if item.state == "changed" and not item.is_noise and reachable(item.name)]
    none: dict[str, Any] = {"words": (), "overall": None, "words_unread": ()}
    if not layers:
        return none | {"words_note": "no layer that reads text has changed"}
    if chosen == () and not more:
        return none | {"words_note": "no words were asked for"}
    base, edited = places
    if config is None and base.path.is_file() and (edited.path / "model_index.json").is_file():
        config = edited.path
    try:
        name = base.source if base.source.startswith("builtin:") else base.path
        backend = choose_backend(
            name, None, token=token, config=None if config is None else str(config), text_only=True
        )
    except DiffEditError as error:
        return none | {
            "words_note": f"the base cannot be run: {error.case}" + (f": {error.cause}" if error.cause else "")
        }
    vocabulary = backend.model.vocabulary
    known = (*vocabulary.objects, *vocabulary.styles) or general_nouns()
    asked = clean_words((*(known if chosen is None else chosen), *more))
    tables, overall, unread = rank_words(backend, *weights, layers, asked)
    note = None if overall is not None else "the text encoder reads none of the words, or none of the layers"
    return {"words": tuple(tables), "overall": overall, "words_unread": unread, "words_note": note}


def _without(names: Iterable[str], other: Weights) -> tuple[str, ...]:
    return tuple(name for name in names if name not in other)


def _not_compared(
    places: tuple[Found, Found],
    weights: tuple[Weights, Weights],
    only: tuple[tuple[str, ...], tuple[str, ...]],
    reshaped: Sequence[str],
    odd: Iterable[str],
) -> tuple[NotCompared, ...]:
    out = []
    for here, there in ((0, 1), (1, 0)):
        who = ("the base", "the edited model")
        for component, reason in sorted(weights[here].unread.items()):
            out.append(NotCompared(what=component, reason=f"{who[here]}: {reason}"))
        theirs = {_component(name) for name in weights[there].names}
        for component in dict.fromkeys(_component(name) for name in only[here]):
            mine = [name for name in only[here] if _component(name) == component]
            if component not in theirs:
                out.append(NotCompared(what=component, reason=f"only {who[here]} has it ({len(mine)} tensors)"))
            else:
                what = f"{len(mine)} tensors of {component}"
                out.append(NotCompared(what=what, reason=f"only {who[here]} has them, such as {mine[0]}"))
    for names, reason in ((reshaped, "their shapes differ"), (sorted(odd), "their dtype is not known")):
        for component in dict.fromkeys(_component(name) for name in names):
            mine = [name for name in names if _component(name) == component]
            out.append(NotCompared(what=f"{len(mine)} tensors of {component}", reason=f"{reason}, such as {mine[0]}"))
    return tuple(out)


def _lacking(one: Weights, other: Weights, only: tuple[tuple[str, ...], tuple[str, ...]]) -> bool:
    """Whether a component that both have lacks a tensor on one side."""
    both = {_component(name) for name in one.names} & {_component(name) for name in other.names}
    return any(_component(name) in both for names in only for name in names)


def _component(name: str) -> str:
    """The component of a canonical name; tables that a checkpoint keeps at its top level count as one."""
    return name.partition(".")[0] if "." in name else "loose tensors"
