"""Random histories of one model: whatever is applied, taken out, saved, composed or broken off, it has the right bits.

    python -m tests.reliability.histories --count 500

The oracle keeps no model, only a list of the edits that should be in it, and sums their changes onto the base in NumPy.
In float64 such a sum is off by a few units in the last place, so it is an interval, far narrower than a step of the
model's own dtype: both ends round to the same number, but for about one number in ten million, where either is right.
Two more rules catch what an interval could hide: without edits the bits are the base's, and the same set of edits gives
the same bits in every history.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from diffedit import Editor
from diffedit.edit import Edit, compose
from diffedit.errors import (
    AlreadyAppliedError,
    DiffEditError,
    ForeignChangeError,
    NotAppliedError,
    RequestError,
    StorageError,
    SwallowedError,
)
from diffedit.ledger import tensor_hash
from diffedit.testing import model_state
from tests.reliability import samples
from tests.reliability.faults import FailingCall, Faults

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SLOT = st.integers(0, 2)
STEPS = 25
# Of the terms' sizes: what reordering a float64 sum of a few dozen products can change, with room to spare.
NOISE = 1e-14

counts: Counter[str] = Counter()


class Broken(Exception):
    """No error that anybody could expect."""


def no_space(*_: object) -> None:
    """A full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(*_: object) -> None:
    """Ctrl-C."""
    raise KeyboardInterrupt


class History(RuleBasedStateMachine):
    """One model and its edits; subclasses name the dtype."""

    dtype: ClassVar[torch.dtype]
    pipeline: ClassVar[Any]
    base: ClassVar[torch.Tensor]
    rest: ClassVar[dict[str, str]]
    seen: ClassVar[dict[frozenset[str], str]]

    edits = Bundle("edits")

    def __init__(self) -> None:
        super().__init__()
        counts["histories"] += 1
        self.folder = Path(tempfile.mkdtemp(prefix="history-"))
        with torch.no_grad():
            self.weight.copy_(self.base)
        self.editor = Editor(self.pipeline)
        self.active: dict[str, Edit] = {}
        self.slots: dict[int, Edit] = {}

    @classmethod
    def prepare(cls) -> None:
        """The model of all histories of this dtype, and what must never change in it."""
        cls.pipeline = samples.pipeline(cls.dtype)
        cls.base = cls._layer().weight.detach().clone()
        cls.rest = cls._others()
        cls.seen = {}

    @classmethod
    def _layer(cls) -> torch.nn.Linear:
        encoder = getattr(cls.pipeline.text_encoder, "text_model", cls.pipeline.text_encoder)
        return encoder.encoder.layers[0].self_attn.out_proj

    @classmethod
    def _others(cls) -> dict[str, str]:
        state = model_state(cls.pipeline)
        return {key: value for key, value in state.items() if not key.endswith("layers.0.self_attn.out_proj.weight")}

    @property
    def weight(self) -> torch.Tensor:
        """The edited layer's live weight."""
        return self._layer().weight

    def teardown(self) -> None:
        """All edits out: the base again, and nothing else was touched."""
        self.editor.revert()
        self.active.clear()
        self.bits_are_right()
        assert self._others() == self.rest
        shutil.rmtree(self.folder)

    # --- what the model must be -----------------------------------------------------------------------------------

    @invariant()
    def bits_are_right(self) -> None:
        """See the module's text."""
        counts["checks"] += 1
        assert self.editor.ledger.active == tuple(self.active)
        assert tuple(edit.id for edit in self.editor.edits) == tuple(self.active)
        live = self.weight.detach()
        if not self.active:
            assert torch.equal(_bits(live), _bits(self.base))
            return
        low, high = self._expected()
        assert bool(((live >= low) & (live <= high)).all())
        counts["numbers"] += live.numel()
        counts["numbers of two roundings"] += int((low != high).sum())
        digest = tensor_hash(live)
        assert self.seen.setdefault(frozenset(self.active), digest) == digest
        if len(self.active) == 1:
            (edit,) = self.active.values()
            (record,) = edit.manifest.sites
            assert record.result_sha256 in (digest, None)

    def _expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        total = self.base.double().numpy().copy()
        size = np.abs(total)
        for edit in self.active.values():
            up, down = _factors(edit)
            total += up @ down
            size += np.abs(up) @ np.abs(down)
        ends = (torch.from_numpy(total - NOISE * size), torch.from_numpy(total + NOISE * size))
        return ends[0].to(self.dtype), ends[1].to(self.dtype)

    # --- rules ----------------------------------------------------------------------------------------------------

    @initialize(target=edits)
    def first_edits(self) -> Any:
        """Three single subjects and two together, all solved on the unedited model."""
        return multiple(*made(self.dtype))

    @rule(edit=edits)
    def apply(self, edit: Edit) -> None:
        """An edit goes in once; what its dtype would swallow is refused."""
        if edit.id in self.active:
            with pytest.raises(AlreadyAppliedError):
                self.editor.load(edit)
            return
        try:
            loaded = self.editor.load(edit)
        except DiffEditError as error:
            counts[f"refused: {type(error).__name__}"] += 1
        else:
            assert loaded.applied and loaded.id == edit.id
            self.active[edit.id] = edit
            counts["applied"] += 1

    @rule(some=st.lists(edits, min_size=2, max_size=4))
    def apply_some(self, some: list[Edit]) -> None:
        """Several at once, so that histories without any are rare."""
        for edit in some:
            self.apply(edit)

    @rule(edit=edits)
    def revert(self, edit: Edit) -> None:
        """Any edit comes out, in whatever order they went in."""
        known = [each for each in self.editor.edits if each.id == edit.id]
        if not known:
            with pytest.raises(NotAppliedError):
                self.editor.revert(edit)
            return
        known[0].revert()
        del self.active[edit.id]
        counts["reverted"] += 1

    @rule()
    def revert_all(self) -> None:
        """Back to the base."""
        self.editor.revert()
        self.active.clear()

    @rule(edit=edits, slot=SLOT)
    def save(self, edit: Edit, slot: int) -> None:
        """Over whatever is there."""
        edit.save(self.folder / str(slot), overwrite=True)
        self.slots[slot] = edit
        counts["saved"] += 1

    @rule(target=edits, slot=SLOT)
    def load(self, slot: int) -> Any:
        """What comes back is what was saved, to the bit."""
        path = self.folder / str(slot)
        if slot not in self.slots:
            with pytest.raises(StorageError):
                Edit.load(path)
            return multiple()
        edit = Edit.load(path)
        assert edit.id == self.slots[slot].id and edit.files() == self.slots[slot].files()
        counts["loaded"] += 1
        return edit

    @rule(target=edits, edit=edits, factor=st.sampled_from([0.5, 2.0, -1.0, 0.75, 1e-6]))
    def scale(self, edit: Edit, factor: float) -> Any:
        """The change times a number; 1e-6 of it is what half precision swallows."""
        scaled = edit * factor
        assert _close(_dense(scaled), factor * _dense(edit))
        counts["scaled"] += 1
        return scaled

    @rule(target=edits, first=edits, second=edits)
    def compose(self, first: Edit, second: Edit) -> Any:
        """Both in one solve, in either order; refused if they share a subject or contradict."""
        try:
            both = compose([first, second])
        except RequestError:
            counts["not composed"] += 1
            return multiple()
        assert compose([second, first]).id == both.id
        subjects = {request.subject for request in (*first.requests, *second.requests)}
        assert {request.subject for request in both.requests} == subjects
        counts["composed"] += 1
        return both

    @rule(target=edits, edit=edits, data=st.data())
    def without(self, edit: Edit, data: st.DataObject) -> Any:
        """One subject less; the last one cannot be taken."""
        subject = data.draw(st.sampled_from([request.subject for request in edit.requests]))
        if len(edit.requests) == 1:
            with pytest.raises(RequestError):
                edit.without(subject)
            return multiple()
        rest = edit.without(subject)
        assert subject not in {request.subject for request in rest.requests}
        counts["taken apart"] += 1
        return rest

    @rule(edit=edits, alone=st.booleans())
    def export_and_read_back(self, edit: Edit, alone: bool) -> None:
        """The LoRA that safetensors' own reader finds is the edit."""
        if alone:
            path = edit.export(self.folder / "adapter.safetensors").path
            data = path.read_bytes()
            path.unlink()
        else:
            data = edit.files()["pytorch_lora_weights.safetensors"]
        tensors = safetensors.torch.load(data)
        (up,) = [tensor for name, tensor in tensors.items() if name.endswith(".lora_up.weight")]
        (down,) = [tensor for name, tensor in tensors.items() if name.endswith(".lora_down.weight")]
        assert _close(up.double().numpy() @ down.double().numpy(), _dense(edit), 1e-6)
        counts["exported"] += 1

    @rule(edit=edits)
    def wear_as_lora(self, edit: Edit) -> None:
        """Diffusers loads the export into the live model; while it is worn nothing is written; then it comes off."""
        path = self.folder / "worn"
        edit.save(path, overwrite=True)
        self.pipeline.load_lora_weights(path, weight_name="pytorch_lora_weights.safetensors")
        try:
            with pytest.raises(DiffEditError):
                self.editor.ablate("hat", target="tree")
        finally:
            self.pipeline.unload_lora_weights()
        counts["worn as LoRA"] += 1

    @rule(edit=edits, slot=SLOT, at=st.integers(1, 40), fault=st.sampled_from([no_space, interrupt]))
    def crash_in_save(self, edit: Edit, slot: int, at: int, fault: Any) -> None:
        """The operating system fails in the middle: the old folder is there, or the new one."""
        path = self.folder / str(slot)
        with pytest.MonkeyPatch.context() as monkeypatch:
            Faults(monkeypatch, at, fault)
            try:
                edit.save(path, overwrite=True)
            except (StorageError, KeyboardInterrupt):
                counts["saves broken off"] += 1
                if slot in self.slots:
                    assert Edit.load(path).files() == self.slots[slot].files()
                else:
                    assert not path.exists()
            else:
                self.slots[slot] = edit
        assert not [name for name in os.listdir(self.folder) if name.startswith(".diffedit-")]

    @rule(edit=edits, at=st.integers(1, 250), error=st.sampled_from([Broken, KeyboardInterrupt, MemoryError]))
    def crash_in_apply(self, edit: Edit, at: int, error: type[BaseException]) -> None:
        """Some call fails on the way: the edit is in or it is not, and the books know."""
        with FailingCall(at, error("injected")) as fault:
            try:
                self.editor.load(edit)
            except (Broken, KeyboardInterrupt, MemoryError, DiffEditError):
                pass
        counts["applications broken off"] += fault.raised
        if edit.id in self.editor.ledger.active:
            self.active.setdefault(edit.id, edit)

    @rule(edit=edits, at=st.integers(1, 120))
    def crash_in_revert(self, edit: Edit, at: int) -> None:
        """The same on the way back."""
        with FailingCall(at, Broken()) as fault:
            try:
                self.editor.revert(edit)
            except (Broken, NotAppliedError):
                pass
        counts["reverts broken off"] += fault.raised
        if edit.id not in self.editor.ledger.active:
            self.active.pop(edit.id, None)

    @rule(edit=edits, number=st.integers(0, 1023))
    def foreign_hand(self, edit: Edit, number: int) -> None:
        """Somebody else changes one number: nothing is written over it, and once it is undone all goes on."""
        if not self.active:
            return
        flat = self.weight.detach().view(-1)
        kept = flat[number].clone()
        flat[number] = kept + 1
        changed = _bits(self.weight.detach()).clone()
        try:
            with pytest.raises((ForeignChangeError, AlreadyAppliedError, SwallowedError)) as caught:
                self.editor.load(edit)
            assert caught.type is not AlreadyAppliedError or edit.id in self.active
            assert torch.equal(_bits(self.weight.detach()), changed)
            with pytest.raises(ForeignChangeError):
                self.editor.revert()
        finally:
            flat[number] = kept
        counts["foreign changes noticed"] += 1


_MADE: dict[torch.dtype, tuple[Edit, ...]] = {}


def made(dtype: torch.dtype) -> tuple[Edit, ...]:
    """The edits that every history starts with."""
    if dtype not in _MADE:
        editor = Editor(samples.pipeline(dtype))
        both = editor.ablate(["hen", "cow"], target="tree", templates=samples.TEMPLATES, preserve=["sun"])
        both.revert()
        _MADE[dtype] = (*samples.edits(3, dtype), Edit(both.manifest, both.delta))
    return _MADE[dtype]


def machine(dtype: torch.dtype) -> type[History]:
    """The state machine of one dtype."""
    name = str(dtype).removeprefix("torch.").capitalize()
    found = type(f"History{name}", (History,), {"dtype": dtype})
    found.prepare()
    return found


def run(count: int, dtype: torch.dtype, *, steps: int = STEPS, shrink: bool = True) -> None:
    """`count` histories of one dtype, the same ones every time; `shrink` looks for a short one that fails as well."""
    chosen = settings(
        max_examples=count,
        stateful_step_count=steps,
        derandomize=True,
        phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine(dtype), settings=chosen)


def _factors(edit: Edit) -> tuple[np.ndarray, np.ndarray]:
    ((_, change),) = edit.delta
    return change.up.double().numpy(), change.down.double().numpy()


def _dense(edit: Edit) -> np.ndarray:
    up, down = _factors(edit)
    return up @ down


def _close(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-7) -> bool:
    return bool(np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    begun = time.perf_counter()
    for i, dtype in enumerate(DTYPES):
        run(len(range(i, options.count, len(DTYPES))), dtype, steps=options.steps)
    print(json.dumps({**counts, "seconds": time.perf_counter() - begun}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
