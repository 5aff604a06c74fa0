"""`--set KEY=VALUE`: text from the command line into a locator's or updater's own fields.

The plugin's pydantic model is the only definition: it knows the names, the types and the limits, so a third party's
settings work here without a line of code. A value is read as JSON when it is JSON (`0.1`, `true`, `null`, `[1, 2]`),
and as text otherwise.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import ValidationError

from diffedit.errors import RequestError, nearest

LOCATOR_PREFIX = "locator."


def split(pairs: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Texts of the form KEY=VALUE, sorted into those for the updater and those for the locator.

    >>> split(["lam=0.1", "locator.layer=3"])
    ({'lam': '0.1'}, {'layer': '3'})
    """
    updater: dict[str, str] = {}
    locator: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip()
        if not equals or not key.removeprefix(LOCATOR_PREFIX):
            raise RequestError(
                "a setting has the form KEY=VALUE", value=repr(pair), hint="write for example --set lam=0.01"
            )
        target = locator if key.startswith(LOCATOR_PREFIX) else updater
        name = key.removeprefix(LOCATOR_PREFIX)
        if name in target:
            raise RequestError("the same setting was given twice", value=repr(key), hint="keep one of them")
        target[name] = value.strip()
    return updater, locator


def build(kind: Literal["locators", "updaters"], name: str, texts: Mapping[str, str]) -> Any:
    """The locator or updater called `name`, with its fields set from `texts`.

    Raises:
        UnknownNameError: nothing is registered under that name.
        RequestError: no such field, or a value that the field refuses.
    """
    from diffedit import registry

    plugin = registry.get(kind, name)
    fields = plugin.model_fields
    for key in texts:
        if key not in fields:
            known = nearest(key, fields) if fields else "It has no settings"
            raise RequestError(f"the {kind[:-1]} {name!r} has no such setting", value=repr(key), hint=known)
    values = {key: _read(text) for key, text in texts.items()}
    try:
        return plugin(**values)
    except ValidationError as error:
        as_text = {str(item["loc"][0]) for item in error.errors() if item["type"] == "string_type" and item["loc"]}
    try:
        return plugin(**{key: texts[key] if key in as_text else value for key, value in values.items()})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ", ".join(texts)
        raise RequestError(
            f"the {kind[:-1]} {name!r} refuses {key}",
            value=repr(texts.get(key, first.get("input"))),
            cause=first["msg"],
        ) from error


def describe(plugin: Any) -> list[dict[str, Any]]:
    """Name, type, default and meaning of each field of a plugin class.

    The meaning is the field's own description, else what the class's docstring says under "Attributes:".
    """
    documented = _documented(plugin)
    return [
        {
            "name": key,
            "type": _type_name(field.annotation),
            "default": None if field.is_required() else _plain(field.get_default(call_default_factory=True)),
            "description": field.description or documented.get(key),
        }
        for key, field in getattr(plugin, "model_fields", {}).items()
    ]


def _documented(plugin: Any) -> dict[str, str]:
    """Attribute -> sentence, from the Google-style docstrings of the class and its bases (the class wins)."""
    found: dict[str, str] = {}
    for cls in plugin.__mro__:
        doc = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
        section = re.search(r"^Attributes:\n((?:[ \t]+.*\n?|\n)+)", doc, re.MULTILINE)
        entries = (
            re.findall(r"^    (\w+)(?: \([^)]*\))?: (.+(?:\n     +.+)*)", section[1], re.MULTILINE) if section else []
        )
        for key, text in entries:
            found.setdefault(key, " ".join(text.split()))
    return found


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | bool) or value is None:
        return value if not isinstance(value, str) else str(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return str(value)
