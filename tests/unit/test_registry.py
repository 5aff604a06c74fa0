"""Proves that a name gives its class, and that a wrong name or a wrong entry point is explained."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from diffedit import registry
from diffedit.errors import UnknownNameError
from diffedit.interfaces import Backend, Locator, Updater
from diffedit.locators.fixed import FixedLocator

KINDS = {"backends": Backend, "locators": Locator, "updaters": Updater}
BUILT_IN = [(kind, name) for kind in KINDS for name in registry.BUILT_IN[kind]]


class Good(FixedLocator):
    name = "good"


class Misnamed(FixedLocator):
    name = "other"


NOT_A_CLASS = Good()


@pytest.fixture
def third_party(monkeypatch):
    """Entry points as if a package had installed them."""

    def install(**points):
        made = [EntryPoint(name.replace("_", "-"), f"{__name__}:{attr}", "g") for name, attr in points.items()]
        monkeypatch.setattr(EntryPoint, "load", lambda self: globals()[self.attr])
        monkeypatch.setattr(registry, "entry_points", lambda group: made if group == "diffedit.locators" else [])

    return install


@pytest.mark.parametrize(("kind", "name"), BUILT_IN)
def test_every_built_in_name_is_a_class_of_its_kind_that_calls_itself_so(kind, name):
    cls = registry.get(kind, name)
    assert issubclass(cls, KINDS[kind]) and cls.name == name and cls.reference
    assert name in registry.names(kind)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("backends", "sd3", "there is no backend of that name: 'sd3'.*Did you mean 'sd[12]'"),
        ("locators", "fixd", "there is no locator of that name: 'fixd'.*Did you mean 'fixed'"),
        ("updaters", "quickfx", "there is no updater of that name: 'quickfx'.*Did you mean 'quickfix'"),
        ("updaters", "zzz", "Known: .*quickfix"),
        ("updaters", "", "there is no updater of that name: ''"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(kind, name, message):
    with pytest.raises(UnknownNameError, match=message):
        registry.get(kind, name)


def test_build_takes_a_name_or_an_object():
    assert registry.build("locators", "fixed") == FixedLocator()
    mine = FixedLocator(layer=2)
    assert registry.build("locators", mine) is mine


@pytest.mark.parametrize(
    "given", [FixedLocator, 5, None, FixedLocator()], ids=["class", "number", "none", "other kind"]
)
def test_build_refuses_anything_else(given):
    with pytest.raises(UnknownNameError, match="given by name or as an object"):
        registry.build("updaters", given)


def test_a_third_party_class_is_found_and_listed(third_party):
    third_party(good="Good")
    assert registry.get("locators", "good") is Good
    assert registry.names("locators") == tuple(sorted({*registry.BUILT_IN["locators"], "good"}))
    assert "good" not in registry.names("updaters")


@pytest.mark.parametrize(
    ("points", "name", "message"),
    [
        (dict(misnamed="Misnamed"), "misnamed", "calls itself otherwise: 'other'"),
        (dict(wrong="KINDS"), "wrong", "is not a locator: .*KINDS.*subclass of diffedit.Locator"),
        (dict(instance="NOT_A_CLASS"), "instance", "is not a locator"),
        (dict(backend="Backend"), "backend", "is not a locator"),
    ],
)
def test_a_wrong_entry_point_is_explained(third_party, points, name, message):
    third_party(**points)
    with pytest.raises(UnknownNameError, match=message):
        registry.get("locators", name)


def test_a_third_party_cannot_take_a_built_in_name(third_party):
    third_party(fixed="Misnamed")
    assert registry.get("locators", "fixed") is FixedLocator
