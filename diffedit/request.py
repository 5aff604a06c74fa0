"""What the user asks for, checked once and then frozen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from diffedit.errors import ContradictionError, DiffEditError, RequestError
from diffedit.text import clean, noun, render

Action = Literal["ablate", "update"]
Kind = Literal["object", "style"]

OBJECT_TEMPLATES = (
    "{}",
    "a {}",
    "the {}",
    "a photo of {}",
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a painting of a {}",
)
STYLE_TEMPLATES = (
    "{}",
    "{} style",
    "in the style of {}",
    "a picture in the style of {}",
    "a painting in the style of {}",
    "a picture of a dog in the style of {}",
    "a picture, {} style",
)


class Request(BaseModel):
    """One concept and what to do with it.

    Attributes:
        subject: the concept's name as it stands in prompts, without an article ("a dog" becomes "dog").
        action: `ablate` suppresses the concept, `update` gives it another meaning. The solve is the same; an update
            needs its target spelled out.
        target: what takes the subject's place; `None` lets the editor choose, which it reports.
        kind: an `object` is replaced by its target in prompts like "a photo of a dog"; a `style` in prompts like
            "a picture in the style of X".
        aliases: other names of the same concept, edited to the same target.
        templates: prompts around the subject, each with exactly one "{}". More kinds of prefix make the edit more
            general; text *after* the subject cannot matter to a causal text encoder. Default: by kind.
        preserve: concepts whose outputs must stay; each is rendered in the same templates.
        seed: for everything random in a locator or updater; the closed form uses none.
        strength: how much of the change to make; 1 is the whole, 0.5 half of it, -1 its opposite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str
    action: Action = "ablate"
    target: str | None = None
    kind: Kind = "object"
    aliases: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    preserve: tuple[str, ...] = ()
    seed: int = 0
    strength: float = 1.0

    @field_validator("subject", "target", mode="before")
    @classmethod
    def _clean_phrase(cls, value: Any, info: Any) -> Any:
        return None if value is None and info.field_name == "target" else noun(clean(value, info.field_name))

    @field_validator("aliases", "preserve", mode="before")
    @classmethod
    def _clean_list(cls, value: Any, info: Any) -> Any:
        if isinstance(value, str) or not isinstance(value, Sequence):
            hint = f"write [{value!r}]" if isinstance(value, str) else "give a list, or leave it out"
            raise RequestError(f"{info.field_name} must be a list of names", value=repr(value), hint=hint)
        singular = {"aliases": "alias", "preserve": "preserve entry"}[info.field_name]
        return tuple(dict.fromkeys(noun(clean(item, singular)) for item in value))

    @field_validator("templates")
    @classmethod
    def _check_templates(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _checked(value)

    @field_validator("strength")
    @classmethod
    def _check_strength(cls, value: float) -> float:
        if not math.isfinite(value) or value == 0:
            raise RequestError("a strength is a finite number, and not 0", value=value, hint="1 is the whole edit")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Request:
        if not self.templates:
            object.__setattr__(self, "templates", OBJECT_TEMPLATES if self.kind == "object" else STYLE_TEMPLATES)
        if self.action == "update" and self.target is None:
            raise RequestError("an update needs a target", value=repr(self.subject), hint="say what it should become")
        names = {name.casefold() for name in self.names}
        if self.target is not None and self.target.casefold() in names:
            raise ContradictionError("the target is the subject", value=repr(self.target), hint="name another target")
        for kept in self.preserve:
            if kept.casefold() in names:
                raise ContradictionError(
                    "preserve holds the subject itself", value=repr(kept), hint="remove it from one side"
                )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The subject and its aliases, without repetition."""
        return tuple(dict.fromkeys((self.subject, *self.aliases)))

    def render(self, phrase: str) -> tuple[tuple[str, int], ...]:
        """Each template filled with `phrase`: (prompt, character offset of the phrase)."""
        return tuple(render(template, phrase) for template in self.templates)


@lru_cache(64)
def _checked(templates: tuple[str, ...]) -> tuple[str, ...]:
    """The templates cleaned, each once; thousands of requests share theirs."""
    for template in templates:
        if template.count("{}") != 1 or template.replace("{}", "").count("{"):
            raise RequestError(
                'a template needs exactly one "{}"',
                value=repr(template),
                cause="the subject has no place in it" if "{}" not in template else "the subject's place is ambiguous",
                hint='write for example "a photo of a {}"',
            )
    return tuple(dict.fromkeys(clean(template, "template") for template in templates))


def edited_names(requests: Iterable[Request]) -> frozenset[str]:
    """Every subject and alias, casefolded."""
    return frozenset(name.casefold() for request in requests for name in request.names)


def held_names(requests: Sequence[Request]) -> Iterator[tuple[Request, str]]:
    """Every preserved name with the request that preserves it; what one request edits no other preserves."""
    edited = edited_names(requests)
    return ((request, name) for request in requests for name in request.preserve if name.casefold() not in edited)


def make_request(**fields: Any) -> Request:
    """A `Request` whose every complaint is a `DiffEditError`, pydantic's type errors included."""
    try:
        return Request(**fields)
    except DiffEditError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "request"
        raise RequestError(f"{where} is not valid", value=repr(first.get("input")), cause=first["msg"]) from error
