"""Name -> class, for backends, locators, updaters and measures: one built-in table, then entry points.

The kind names the entry-point group: `diffedit.backends`, `diffedit.locators`, `diffedit.updaters` or
`diffedit.measures`.
Built-in classes are imported only when they are asked for, so `import diffedit` stays light.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from pydantic import ValidationError

from diffedit.errors import RequestError, UnknownNameError, nearest
from diffedit.interfaces import Backend, Locator, Plugin, Updater
from diffedit.traceable import Measure

logger = logging.getLogger("diffedit")

Kind = Literal["backends", "locators", "updaters", "measures"]

BUILT_IN: dict[Kind, dict[str, str]] = {
    "backends": {
        "sd1": "diffedit.backends.stable_diffusion:SD1",
        "sd2": "diffedit.backends.stable_diffusion:SD2",
        "sdxl": "diffedit.backends.sdxl:SDXL",
    },
    "locators": {
        "fixed": "diffedit.locators.fixed:FixedLocator",
        "causal-trace": "diffedit.locators.causal_trace:CausalTracing",
        "locogen": "diffedit.locators.locogen:LocoGen",
        "cross-attention": "diffedit.locators.cross_attention:CrossAttentionLocator",
        "text-layers": "diffedit.locators.text_layers:TextLayersLocator",
        "text-mlp": "diffedit.locators.text_mlp:TextMLPLocator",
        "text-mlp-range": "diffedit.locators.text_mlp_range:TextMLPRangeLocator",
        "unet-unconditional": "diffedit.locators.unet_unconditional:UNetUnconditionalLocator",
    },
    "updaters": {
        "quickfix": "diffedit.updaters.closed_form:QuickFix",
        "quickfix-published": "diffedit.updaters.closed_form:QuickFixPublished",
        "uce": "diffedit.updaters.cross_attention:UCE",
        "time": "diffedit.updaters.cross_attention:TIME",
        "locoedit": "diffedit.updaters.cross_attention:LocoEdit",
        "refact": "diffedit.updaters.rank_one:ReFACT",
        "emcid": "diffedit.updaters.emcid:EMCID",
        "esd": "diffedit.updaters.finetune.esd:ESD",
        "esd-u": "diffedit.updaters.finetune.esd:ESDUnconditional",
        "concept-ablation": "diffedit.updaters.finetune.concept_ablation:ConceptAblation",
        "finetune-text-encoder": "diffedit.updaters.finetune.text_encoder:FineTuneTextEncoder",
    },
    "measures": {
        "embedding": "diffedit.locators.measures:EmbeddingEffect",
        "denoising": "diffedit.locators.measures:DenoisingEffect",
        "image": "diffedit.evaluate.image_score:ImageScore",
    },
}
_BASES: dict[Kind, type] = {"backends": Backend, "locators": Locator, "updaters": Updater, "measures": Measure}


def names(kind: Kind) -> tuple[str, ...]:
    """All registered names of a kind, sorted."""
    return tuple(sorted({*BUILT_IN[kind], *_third_party(kind)}))


def get(kind: Kind, name: str) -> Any:
    """The class registered under a name.

    Raises:
        UnknownNameError: no such name; a plugin that takes a built-in name; or an entry point that is not of the kind.
    """
    if name in BUILT_IN[kind]:
        module, _, attribute = BUILT_IN[kind][name].partition(":")
        found = getattr(importlib.import_module(module), attribute)
        return found
    others = _third_party(kind)
    if name not in others:
        raise UnknownNameError(
            f"there is no {kind[:-1]} of that name", value=repr(name), hint=nearest(name, names(kind))
        )
    try:
        found = others[name].load()
    except Exception as error:  # a plugin's import may fail in any way; the user needs to know which one it is
        raise UnknownNameError(
            f"the {kind[:-1]} {name!r} cannot be loaded",
            value=others[name].value,
            cause=f"{type(error).__name__}: {error}",
            hint="fix or uninstall its package",
        ) from error
    if not (isinstance(found, type) and issubclass(found, _BASES[kind])):
        raise UnknownNameError(
            f"the entry point {name!r} is not a {kind[:-1]}",
            value=others[name].value,
            hint=f"point it at a subclass of diffedit.{_BASES[kind].__name__}",
        )
    if getattr(found, "name", None) != name:
        raise UnknownNameError(
            f"the entry point {name!r} points at a class that calls itself otherwise",
            value=repr(getattr(found, "name", None)),
            hint="make the two names equal",
        )
    return found


def backends() -> tuple[type[Backend], ...]:
    """Every backend that can be loaded; a broken plugin is logged and left out, for the model may not be its own."""
    found = []
    for name in names("backends"):
        try:
            found.append(get("backends", name))
        except UnknownNameError as error:
            logger.warning("%s", error)
    return tuple(found)


def build(kind: Literal["locators", "updaters"], given: str | Plugin) -> Any:
    """A locator or updater from its name (default settings), or the given object itself if it is one."""
    if isinstance(given, _BASES[kind]):
        return given
    if not isinstance(given, str):
        raise UnknownNameError(f"a {kind[:-1]} is given by name or as an object", value=type(given).__name__)
    return get(kind, given)()


def configure(kind: Literal["locators", "updaters", "measures"], name: str, settings: Mapping[str, Any]) -> Any:
    """A plugin from its name and its fields.

    Raises:
        UnknownNameError: no such name.
        RequestError: no such field, or a value that the field refuses.
    """
    plugin = get(kind, name)
    try:
        return plugin(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or name
        raise RequestError(
            f"the {kind[:-1]} {name!r} refuses {field}",
            value=repr(first.get("input")),
            cause=first["msg"],
            hint=f"its settings are {', '.join(plugin.model_fields) or 'none'}",
        ) from error


def _third_party(kind: Kind) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"diffedit.{kind}") if point.name not in BUILT_IN[kind]}
