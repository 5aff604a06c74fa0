"""The garbage collector waits, and is back afterwards whatever happens."""

from __future__ import annotations

import gc

import pytest

from diffedit.garbage import postponed


@pytest.fixture(autouse=True)
def collecting():
    was = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if was else gc.disable)()


def test_it_waits_inside_and_is_back_after():
    with postponed():
        assert not gc.isenabled()
        with postponed():
            assert not gc.isenabled()
        assert not gc.isenabled()  # the inner one did not put it off
    assert gc.isenabled()


def test_it_is_back_after_an_error():
    @postponed()
    def fails():
        assert not gc.isenabled()
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fails()
        assert gc.isenabled()


def test_who_switched_it_off_keeps_it_off():
    gc.disable()
    with postponed():
        pass
    assert not gc.isenabled()
