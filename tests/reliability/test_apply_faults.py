"""Whatever fails while an edit is made, applied or reverted: the model has the bytes, hooks and modes of before.

Every single call that the package makes is replaced by an exception once, its own functions and everybody else's, in
Python and in C. Afterwards the same work has to succeed, so that nothing (a lock, a half-written book) is left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffedit import Editor
from diffedit.testing import model_state
from diffedit.updaters.closed_form import QuickFix
from tests.reliability import samples
from tests.reliability.faults import FailingCall


class Broken(Exception):
    """No error that anybody could expect."""


ERRORS: list[type[BaseException]] = [Broken, KeyboardInterrupt, MemoryError]


class Bench:
    """A model with one edit in it, and the work to be broken."""

    def __init__(self, what: str, folder: Path) -> None:
        self.editor = Editor(samples.pipeline())
        first, second, third = samples.edits(3)
        self.first = self.editor.load(first)
        self.loaded = second
        if what == "revert":
            self.editor.load(second)
        self.path = third.save(folder / "edit", overwrite=True)
        self.work: Callable[[], object] = {
            "apply": lambda: self.editor.ledger.apply(second.id, second.delta),
            "load": lambda: self.editor.load(self.path),
            "revert": lambda: self.editor.revert(second),
            "ablate": lambda: self.editor.ablate("owl", target="tree", templates=samples.TEMPLATES, updater=QuickFix()),
        }[what]
        self.undo: Callable[[], object] = {
            "apply": lambda: self.editor.ledger.revert(second.id),
            "revert": lambda: self.editor.load(second),
        }.get(what, lambda: self.editor.revert(self.editor.edits[-1]))

    def state(self) -> dict[str, Any]:
        """The text encoder's bytes, hooks and modes, and what the books say is in it."""
        encoder = self.editor.pipeline.text_encoder
        numbers = {name: tensor.numpy().tobytes() for name, tensor in encoder.state_dict().items()}
        modules = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in encoder.modules()]
        return {**numbers, "modules": modules, "active": self.editor.ledger.active}


def every_call(what: str, folder: Path, step: int = 1) -> int:
    """Break every `step`-th call; returns how many."""
    bench = Bench(what, folder)
    everything = model_state(bench.editor.pipeline)
    before = bench.state()
    counts = [-1]
    while len(counts) < 3 or counts[-1] != counts[-2]:  # until the caches are full: a call saved later never comes
        assert len(counts) < 8, counts
        with FailingCall(0, Broken()) as counter:
            bench.work()
        counts.append(counter.count)
        after = bench.state()
        assert after != before  # the control: the work, undisturbed, does change the model
        bench.undo()
        assert bench.state() == before
    broken = 0
    for at in range(1, counts[-1] + 1, step):
        error = ERRORS[at % len(ERRORS)]("injected")
        with FailingCall(at, error) as fault:
            try:
                bench.work()
            except BaseException as caught:
                if not isinstance(caught, Exception | KeyboardInterrupt):
                    raise
        assert fault.raised, f"call {at} of {counts[-1]} never came"
        found = bench.state()
        if found != before:
            # A failure after the last write, in logging perhaps: then the work is done, and the books say so.
            assert found == after, f"{fault.where}: neither as before nor as after"
            assert len(bench.editor.edits) == len(bench.editor.ledger.active) or what == "apply", fault.where
            bench.undo()
            assert bench.state() == before, fault.where
        broken += 1
    bench.work()
    assert bench.state() == after
    bench.undo()
    assert model_state(bench.editor.pipeline) == everything  # the UNet and the VAE too
    return broken


@pytest.mark.parametrize("what", ["apply", "revert"])
def test_every_call_of_the_ledger(what: str, tmp_path: Path) -> None:
    assert every_call(what, tmp_path) > 40


def test_calls_of_loading(tmp_path: Path) -> None:
    assert every_call("load", tmp_path, step=9) > 40


def test_calls_of_making_an_edit(tmp_path: Path) -> None:
    assert every_call("ablate", tmp_path, step=23) > 40


@pytest.mark.slow
@pytest.mark.parametrize("what", ["load", "ablate"])
def test_every_call_of_loading_and_making(what: str, tmp_path: Path) -> None:
    assert every_call(what, tmp_path) > 500
