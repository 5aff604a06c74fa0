"""`--set` reads types, limits and meanings from the plugin itself."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

import pytest
from pydantic import BaseModel, ConfigDict, Field

from diffedit import registry
from diffedit.cli import settings
from diffedit.errors import RequestError


class Flavour(StrEnum):
    SWEET = "sweet"
    SOUR = "sour"


class Gadget(BaseModel):
    """A plugin with a field of each kind.

    Attributes:
        strength: how much; a longer
            explanation.
        label: free text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: ClassVar[str] = "gadget"
    reference: ClassVar[str] = "none"

    strength: float = Field(default=1.0, ge=0)
    count: int = Field(default=3, description="how many")
    label: str = "plain"
    on: bool = False
    limit: float | None = 2.0
    layers: tuple[int, ...] = (0,)
    flavour: Flavour = Flavour.SWEET


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(registry, "get", lambda kind, name: Gadget)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("strength=0.25", "strength", 0.25),
        ("strength=1e-3", "strength", 1e-3),
        ("count=7", "count", 7),
        ("label=hello", "label", "hello"),
        ("label=123", "label", "123"),
        ("label=a=b", "label", "a=b"),
        ("on=true", "on", True),
        ("limit=null", "limit", None),
        ("layers=[0, 1]", "layers", (0, 1)),
        ("flavour=sour", "flavour", Flavour.SOUR),
        (" count = 7 ", "count", 7),
    ],
)
def test_values_take_the_type_of_their_field(text, key, value):
    updater, locator = settings.split([text])
    assert locator == {}
    assert getattr(settings.build("updaters", "gadget", updater), key) == value


@pytest.mark.parametrize("text", ["strength=-1", "count=1.5", "on=maybe", "layers=7", "flavour=bitter", "strength="])
def test_values_outside_the_field_are_refused(text):
    updater, _ = settings.split([text])
    key, value = text.split("=")
    with pytest.raises(RequestError, match=key) as caught:
        settings.build("updaters", "gadget", updater)
    assert caught.value.value == repr(value)


@pytest.mark.parametrize("text", ["count", "=3", "locator.=3", ""])
def test_a_setting_has_a_key_and_a_value(text):
    with pytest.raises(RequestError, match="KEY=VALUE"):
        settings.split([text])


def test_locator_prefix_sorts_settings():
    assert settings.split(["a=1", "locator.a=2"]) == ({"a": "1"}, {"a": "2"})


def test_describe_reads_the_field_or_the_docstring():
    described = {item["name"]: item for item in settings.describe(Gadget)}
    assert described["strength"]["description"] == "how much; a longer explanation."
    assert described["count"] == {"name": "count", "type": "int", "default": 3, "description": "how many"}
    assert described["layers"]["default"] == [0] and described["flavour"]["default"] == "sweet"
    assert described["limit"]["description"] is None
