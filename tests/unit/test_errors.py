"""Proves that every error says case, value, cause and next step, and has a code that no other error has."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

from diffedit import errors
from diffedit.errors import DiffEditError, UnknownNameError, nearest

TREE = [x for x in vars(errors).values() if inspect.isclass(x) and issubclass(x, DiffEditError)]


def test_codes_are_unique_and_well_formed():
    codes = [cls.code for cls in TREE]
    assert len(TREE) > 20 and len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"DE-\d{3}", code) for code in codes)


@pytest.mark.parametrize("cls", TREE, ids=lambda c: c.__name__)
def test_every_error_is_documented_has_its_own_code_and_an_exit_code(cls):
    assert "code" in vars(cls), "a code must not be inherited"
    assert cls.exit_code in (1, 2)
    assert cls.__doc__ and cls.__doc__.strip()
    for parent in cls.__mro__[1:-3]:
        if parent is not DiffEditError and issubclass(parent, DiffEditError):
            assert cls.code[:4] == parent.code[:4], "a child's code starts as its parent's"


def test_the_message_holds_all_four_parts_in_order():
    error = UnknownNameError("there is no such thing", value="'x'", cause="a typo", hint="look again.")
    assert str(error) == "[DE-200] there is no such thing: 'x'. A typo. Look again."
    assert (error.case, error.value, error.cause, error.hint) == (
        "there is no such thing",
        "'x'",
        "a typo",
        "look again.",
    )
    assert str(UnknownNameError("no more")) == "[DE-200] no more."
    assert str(UnknownNameError("number", value=0)) == "[DE-200] number: 0."


def test_a_question_ends_the_message_as_it_is():
    assert str(UnknownNameError("no", hint="Did you mean 'x'?")).endswith("Did you mean 'x'?")


@pytest.mark.parametrize("again", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "process"])
def test_an_error_survives_a_copy_and_the_way_from_a_worker_process(again):
    error = UnknownNameError("no such", value="x", cause="typo", hint="look")
    other = again(error)
    assert type(other) is UnknownNameError and str(other) == str(error) and other.hint == "look"


@pytest.mark.parametrize(
    ("name", "known", "sentence"),
    [
        ("quickfx", ["fixed", "quickfix"], "Did you mean 'quickfix'?"),
        ("zzz", ["b", "a"], "Known: a, b"),
        ("zzz", [], "Known: none"),
        ("", ["a"], "Known: a"),
    ],
)
def test_nearest(name, known, sentence):
    assert nearest(name, known) == sentence
