"""Makes one call that the writer sends to the operating system go wrong: fail, or never return."""

from __future__ import annotations

import inspect
import os
import signal
import stat
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from diffedit.io import folder

CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "link", "chmod", "listdir", "stat")
MODULES = ("diffedit.io.folder", "diffedit.storage", "diffedit.io.destination")

_FSTAT, _WRITE = os.fstat, os.write

Fault = Callable[[str, tuple[Any, ...]], None]


class Faults:
    """Counts the calls that our modules make through `os` (nobody else's), and hands number `at` to `fault`.

    Args:
        monkeypatch: what undoes the patches.
        at: the number of the call, from 1; 0 lets all pass.
        fault: called before it with its name and arguments; raises, kills, or returns to let the call go on.
        calls: names in `os`; the swap of two folders is always among them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, fault: Fault, calls: tuple[str, ...] = CALLS) -> None:
        self.at, self.fault = at, fault
        self.log: list[str] = []
        self._folders: set[int] = set()
        for name in calls:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))
        monkeypatch.setattr(folder, "exchange", self._wrap("exchange", folder.exchange))

    @property
    def count(self) -> int:
        """How many calls there were."""
        return len(self.log)

    def describe(self, at: int) -> str:
        """The name of call `at`, telling the fsync of a folder from that of a file."""
        return "dirsync" if at in self._folders else self.log[at - 1]

    def _wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **keywords: Any) -> Any:
            if sys._getframe(1).f_globals.get("__name__") in MODULES:
                self.log.append(name)
                if name == "fsync" and stat.S_ISDIR(_FSTAT(args[0]).st_mode):
                    self._folders.add(len(self.log))
                if len(self.log) == self.at:
                    self.fault(name, args)
            return call(*args, **keywords)

        return wrapped


def kill(name: str, args: tuple[Any, ...]) -> None:
    """Die before the call."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_halfway(name: str, args: tuple[Any, ...]) -> None:
    """Die in the middle of a write, or before any other call."""
    if name == "write":
        _WRITE(args[0], args[1][: len(args[1]) // 2])
    kill(name, args)


# What cannot fail, and must not be made to: releasing a lock, taking a hook away, lengthening a list, switching the
# garbage collector on again, and what the interpreter does by itself: entering and leaving blocks, closing generators.
_CANNOT_FAIL = {"release", "remove", "append", "enable", "__enter__", "__exit__", "__del__"}


class FailingCall:
    """Raises at the `at`-th call that the package makes, of its own functions or any other, and then stands back.

    Args:
        at: the number of the call, from 1; 0 only counts.
        error: what is raised instead of the call.
    """

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error = at, error
        self.count = 0
        self.where = ""

    def __enter__(self) -> FailingCall:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    @property
    def raised(self) -> bool:
        """Whether the call came."""
        return bool(self.where)

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and not frame.f_code.co_flags & inspect.CO_GENERATOR:
            caller, name = frame.f_back, frame.f_code.co_name
        elif event == "c_call":
            caller, name = frame, getattr(arg, "__name__", "")
        else:
            return
        home = caller.f_globals.get("__name__", "") if caller is not None else ""
        if caller is None or not home.startswith("diffedit.") or name in _CANNOT_FAIL:
            return
        self.count += 1
        if self.count == self.at:
            sys.setprofile(None)
            self.where = f"{home}:{caller.f_lineno} calling {name}"
            raise self.error
