"""Proves that the ledger writes all or nothing, takes back to the bit, and never overwrites what it did not write."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from diffedit import ledger as module
from diffedit.delta import Delta, LowRank
from diffedit.errors import (
    AlreadyAppliedError,
    DiffEditError,
    ForeignChangeError,
    ModelBusyError,
    NonFiniteError,
    NoOpError,
    NotAppliedError,
    SwallowedError,
)
from diffedit.ledger import Ledger, cast_hashes, tensor_hash
from tests.unit.toy import SITES, Toy, change

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def toy(request):
    return Toy(request.param)


@pytest.fixture
def ledger(toy):
    return Ledger(toy)


def test_apply_writes_the_rounded_sum_and_revert_restores_every_bit(toy, ledger):
    """Subtraction would not: the control undoes the same change the naive way and ends at other bits."""
    before, base = toy.bits(), [layer.weight.detach().clone() for layer in toy.layers]
    first, second = change(1), change(2, sites=SITES[:1])
    ledger.apply("first", first)
    ledger.apply("second", second)
    for site, layer, old in zip(SITES, toy.layers, base, strict=True):
        wanted = old.double() + first.factors[site].dense() + ((second.factors[site].dense()) if site.layer == 0 else 0)
        torch.testing.assert_close(layer.weight.detach(), wanted.to(old.dtype))
        assert not torch.equal(layer.weight, old)
    ledger.revert("first")
    ledger.revert("second")
    assert toy.bits() == before and ledger.active == ()

    naive = base[0] + change(3).factors[SITES[0]].dense(base[0].dtype)
    assert not torch.equal(naive - change(3).factors[SITES[0]].dense(base[0].dtype), base[0])


def test_trial_predicts_apply_and_writes_nothing(toy, ledger):
    before = toy.bits()
    trial = ledger.trial(change(1))
    assert toy.bits() == before
    ledger.apply("edit", change(1))
    for site in SITES:
        assert trial[site].sha256 == tensor_hash(toy.weight(site))
        ratio = change(1).factors[site].norm() / float(ledger.base(site).double().norm())
        assert trial[site].relative_norm == pytest.approx(ratio, rel=1e-6)
        assert 0.98 < trial[site].achieved < 1.02


def test_a_trial_spares_the_second_computation_and_gives_the_same_bits(toy):
    plain, spared = Ledger(toy), Ledger(other := Toy(toy.layers[0].weight.dtype))
    plain.apply("edit", change(1))
    spared.apply("edit", change(1), spared.trial(change(1)))
    assert toy.bits() == other.bits()
    spared.revert("edit")
    assert other.bits() == Toy(toy.layers[0].weight.dtype).bits()


def test_double_apply_and_unknown_revert_are_refused(toy, ledger):
    ledger.apply("edit", change(1))
    applied = toy.bits()
    with pytest.raises(AlreadyAppliedError, match="in the model already: edit"):
        ledger.apply("edit", change(2))
    with pytest.raises(NotAppliedError, match="not in this model: other"):
        ledger.revert("other")
    assert toy.bits() == applied and ledger.active == ("edit",)


def test_a_foreign_change_is_neither_overwritten_nor_lost(toy, ledger):
    ledger.apply("edit", change(1))
    own = toy.layers[1].weight.detach().clone()
    with torch.no_grad():
        toy.layers[1].weight[0, 0] += 1
    foreign = toy.bits()
    for work in (
        lambda: ledger.revert("edit"),
        lambda: ledger.apply("next", change(2)),
        lambda: ledger.check(SITES[1]),
        lambda: ledger.unedited().__enter__(),
    ):
        with pytest.raises(ForeignChangeError, match=r"layers\.1.*found [0-9a-f]{12}, the ledger wrote [0-9a-f]{12}"):
            work()
        assert toy.bits() == foreign and ledger.active == ("edit",)
    ledger.check(SITES[0])  # the other layer is as it was
    with torch.no_grad():
        toy.layers[1].weight.copy_(own)
    ledger.revert("edit")
    assert toy.bits() == Toy(toy.layers[0].weight.dtype).bits()


def test_a_refused_edit_leaves_no_trace_of_itself(toy, ledger):
    """The base that a failed attempt saw must not come back later, over work that was done in between."""
    bad = change(1) + Delta({SITES[1]: LowRank(torch.full((6, 1), float("nan")), torch.ones(1, 5))})
    with pytest.raises(NonFiniteError):
        ledger.apply("bad", bad)
    with torch.no_grad():
        toy.layers[0].weight.add_(1)  # training, another LoRA, a reload: nothing of ours is in the model
    between = toy.bits()
    ledger.apply("edit", change(2))
    ledger.revert("edit")
    assert toy.bits() == between


@pytest.mark.parametrize(("up", "down", "count"), [(float("nan"), 1.0, 6), (1.0, float("inf"), 5)])
def test_a_change_that_is_not_finite_is_refused(toy, ledger, up, down, count):
    before, bad = toy.bits(), Delta({SITES[0]: LowRank(torch.full((6, 1), up), torch.full((1, 5), down))})
    for attempt in (lambda: ledger.trial(bad), lambda: ledger.apply("edit", bad)):
        with pytest.raises(NonFiniteError, match=rf"layers\.0.*not finite: {count} numbers"):
            attempt()
        assert toy.bits() == before and ledger.active == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(toy, ledger, value):
    with torch.no_grad():
        toy.layers[1].weight[2, 3] = value
        toy.layers[1].weight[2, 4] = -value
    before = toy.bits()
    with pytest.raises(NonFiniteError, match=r"layers\.1.*not finite: 2 numbers"):
        ledger.apply("edit", change(1))
    assert toy.bits() == before and ledger.active == ()


def test_overflow_in_half_precision_is_refused():
    toy = Toy(torch.float16)
    before = toy.bits()
    with pytest.raises(NonFiniteError, match=r"overflows torch\.float16"):
        Ledger(toy).apply("edit", change(1, 5e4))
    assert toy.bits() == before
    Ledger(Toy(torch.float32)).apply("edit", change(1, 5e4))  # control: single precision holds it


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 3e-4), (torch.float16, 3e-5), (torch.float32, 3e-9)])
def test_a_change_below_the_rounding_step_is_refused(dtype, scale):
    toy = Toy(dtype)
    before = toy.bits()
    with pytest.raises(SwallowedError, match=rf"{dtype} keeps too little.*% of it, at least \d\d% is needed"):
        Ledger(toy).apply("edit", change(1, scale))
    assert toy.bits() == before
    Ledger(Toy(torch.float64)).apply("edit", change(1, scale))  # control


def test_a_change_below_the_rounding_step_is_refused_beside_a_large_one():
    """Another edit's size must not hide that this one does nothing."""
    toy = Toy(torch.bfloat16)
    ledger = Ledger(toy)
    ledger.apply("large", change(1))
    before = toy.bits()
    with pytest.raises(SwallowedError):
        ledger.apply("tiny", change(2, 1e-5))
    assert toy.bits() == before and ledger.active == ("large",)


def test_a_change_of_zero_is_refused(toy, ledger):
    with pytest.raises(NoOpError, match="does not change"):
        ledger.apply("edit", change(1, 0.0))
    assert ledger.active == ()


def test_a_change_of_no_site_is_refused(ledger):
    with pytest.raises(NoOpError, match="does not change"):
        ledger.apply("edit", Delta({}))
    assert ledger.active == ()


def test_reverting_works_when_the_remaining_edits_cancel(toy, ledger):
    """A and -A beside B: taking B out leaves no change at all, which is no reason to refuse."""
    before = toy.bits()
    ledger.apply("plus", change(1))
    ledger.apply("other", change(2))
    ledger.apply("minus", -1.0 * change(1))
    ledger.revert("other")
    for layer, old in zip(toy.layers, Toy(toy.layers[0].weight.dtype).layers, strict=True):
        torch.testing.assert_close(layer.weight, old.weight)
    ledger.revert("plus")
    ledger.revert("minus")
    assert toy.bits() == before


@pytest.mark.parametrize("fail_at", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_a_write_that_fails_half_way_is_undone(toy, ledger, monkeypatch, fail_at, error):
    ledger.apply("first", change(1))
    before, copy, calls = toy.bits(), torch.Tensor.copy_, []

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == fail_at:
            self.fill_(7)  # as if the copy had been cut off in the middle
            raise error
        return copy(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", failing)
    with pytest.raises(type(error)):
        ledger.apply("second", change(2))
    monkeypatch.undo()
    assert toy.bits() == before and ledger.active == ("first",)
    ledger.apply("second", change(2))
    ledger.revert("first")
    ledger.revert("second")
    assert toy.bits() == Toy(toy.layers[0].weight.dtype).bits()


class _InterruptAt:
    """Raises `KeyboardInterrupt` at the n-th line that `Ledger._rewrite` executes; counts lines."""

    def __init__(self, n: int) -> None:
        self.n, self.seen, self.fired = n, 0, False

    def __enter__(self):
        self.old = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *exc):
        sys.settrace(self.old)

    def _call(self, frame, event, arg):
        inside = frame.f_code.co_name == "_rewrite" and frame.f_code.co_filename == module.__file__
        return self._line if inside else None

    def _line(self, frame, event, arg):
        if event == "line" and not self.fired:
            self.seen += 1
            if self.seen == self.n:
                self.fired = True
                raise KeyboardInterrupt
        return self._line


@pytest.mark.parametrize("work", ["apply", "revert"])
def test_ctrl_c_at_any_line_of_a_write_leaves_a_whole_state(work):
    """Weights and book-keeping are both as before or both as after, and the ledger goes on working."""

    def fresh() -> tuple[Toy, Ledger]:
        toy = Toy()
        ledger = Ledger(toy)
        ledger.apply("first", change(1))
        return toy, ledger

    def run(ledger: Ledger) -> None:
        if work == "apply":
            ledger.apply("second", change(2))
        else:
            ledger.revert("first")

    toy, ledger = fresh()
    before = (toy.bits(), ledger.active)
    run(ledger)
    allowed = {before, (toy.bits(), ledger.active)}
    for n in range(1, 200):
        toy, ledger = fresh()
        with _InterruptAt(n) as trap, contextlib.suppress(KeyboardInterrupt):
            run(ledger)
        if not trap.fired:
            assert n > 15  # control: many lines were tried
            return
        assert (toy.bits(), ledger.active) in allowed, f"interrupted at line {n} of the write"
        for name in ledger.active:
            ledger.revert(name)
        assert toy.bits() == Toy().bits()
    raise AssertionError("the write never ended")


def test_unedited_shows_the_base_and_brings_the_edits_back(toy, ledger):
    base = toy.bits()
    with ledger.unedited():
        assert toy.bits() == base  # nothing to do
    ledger.apply("a", change(1))
    ledger.apply("b", change(2, sites=SITES[1:]))
    edited = toy.bits()
    with ledger.unedited():
        assert toy.bits() == base
    assert toy.bits() == edited and ledger.active == ("a", "b")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_unedited_brings_the_edits_back(toy, ledger, error):
    ledger.apply("a", change(1))
    edited = toy.bits()
    with pytest.raises(error), ledger.unedited():
        raise error
    assert toy.bits() == edited and ledger.active == ("a",)
    ledger.revert("a")


def test_a_foreign_change_inside_unedited_is_reported_and_kept(toy, ledger):
    ledger.apply("a", change(1))
    with pytest.raises(ForeignChangeError), ledger.unedited(), torch.no_grad():
        toy.layers[0].weight[0, 0] = 5.0
    assert float(toy.layers[0].weight[0, 0]) == 5.0


def test_a_second_thread_is_turned_away(toy, ledger):
    ledger.apply("a", change(1))
    entered, leave, problems = threading.Event(), threading.Event(), []

    def hold():
        try:
            with ledger.unedited():
                entered.set()
                leave.wait(10)
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(10)
    held = toy.bits()
    try:
        for work in (lambda: ledger.apply("b", change(2)), lambda: ledger.revert("a")):
            with pytest.raises(ModelBusyError, match="another thread"):
                work()
            assert toy.bits() == held
    finally:
        leave.set()
        thread.join(10)
    assert not problems and ledger.active == ("a",)
    ledger.apply("b", change(2))
    ledger.revert("a")


def test_a_write_keeps_identity_layout_and_gradient_flag(toy, ledger):
    weight = toy.layers[0].weight
    toy.layers[1].weight = torch.nn.Parameter(toy.layers[1].weight.detach().T.contiguous().T, requires_grad=False)
    stride, address = toy.layers[1].weight.stride(), weight.data_ptr()
    before = toy.bits()
    ledger.apply("a", change(1))
    assert toy.layers[0].weight is weight and weight.data_ptr() == address and weight.requires_grad
    assert toy.layers[1].weight.stride() == stride and not toy.layers[1].weight.requires_grad
    ledger.revert("a")
    assert toy.bits() == before


def test_hashes_see_numbers_not_layout(toy):
    weight = toy.layers[0].weight.detach()
    assert tensor_hash(weight) == tensor_hash(weight.T.contiguous().T)
    other = weight.clone()
    other.view(torch.uint8)[0, 0] ^= 1
    assert tensor_hash(other) != tensor_hash(weight)


@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        (torch.float64, ["float64", "float32", "float16", "bfloat16"]),
        (torch.float32, ["float32", "float16", "bfloat16"]),
        (torch.float16, ["float16"]),
        (torch.bfloat16, ["bfloat16"]),
    ],
)
def test_cast_hashes_name_the_own_and_every_narrower_dtype(dtype, names):
    weight = Toy(dtype).layers[0].weight
    hashes = cast_hashes(weight)
    assert list(hashes) == names
    assert all(hashes[name] == tensor_hash(weight.to(getattr(torch, name))) for name in names)


class History(RuleBasedStateMachine):
    """Any history of four edits over two layers: the same set of edits is always the same bits."""

    dtype = torch.float32
    CHANGES: ClassVar = {
        "a": change(1),
        "b": change(2, sites=SITES[:1]),
        "c": change(3, 0.5, sites=SITES[1:], rank=1),
        "d": change(4, 0.3),
    }
    names = st.sampled_from(sorted(CHANGES))

    def __init__(self) -> None:
        super().__init__()
        self.toy = Toy(self.dtype)
        self.ledger = Ledger(self.toy)
        self.expected: list[str] = []
        self.known = {frozenset(): self.toy.bits()}

    @rule(name=names)
    def apply(self, name):
        if name in self.expected:
            with pytest.raises(AlreadyAppliedError):
                self.ledger.apply(name, self.CHANGES[name])
        else:
            self.ledger.apply(name, self.CHANGES[name])
            self.expected.append(name)

    @rule(name=names)
    def revert(self, name):
        if name in self.expected:
            self.ledger.revert(name)
            self.expected.remove(name)
        else:
            with pytest.raises(NotAppliedError):
                self.ledger.revert(name)

    @rule()
    def look_at_the_base(self):
        with self.ledger.unedited():
            assert self.toy.bits() == self.known[frozenset()]

    @rule(name=names)
    def refuse_a_broken_edit(self, name):
        with pytest.raises(DiffEditError):
            self.ledger.apply("broken", float("nan") * self.CHANGES[name])

    @precondition(lambda self: self.expected)
    @rule(name=names, layer=st.sampled_from([0, 1]))
    def change_from_outside_and_back(self, name, layer):
        touched = any(site.layer == layer for e in self.expected for site in self.CHANGES[e].sites)
        weight = self.toy.layers[layer].weight
        with torch.no_grad():
            old = weight[0, 0].clone()
            weight[0, 0] = 9.0
        if touched and name in self.expected and any(s.layer == layer for s in self.CHANGES[name].sites):
            with pytest.raises(ForeignChangeError):
                self.ledger.revert(name)
        with torch.no_grad():
            weight[0, 0] = old

    @invariant()
    def same_edits_same_bits(self):
        assert list(self.ledger.active) == self.expected
        bits = self.toy.bits()
        assert self.known.setdefault(frozenset(self.expected), bits) == bits

    @invariant()
    def the_sum_is_the_sum(self):
        for site in SITES:
            wanted = Toy(self.dtype).weight(site).detach().double()
            for name in self.expected:
                if site in self.CHANGES[name].factors:
                    wanted = wanted + self.CHANGES[name].factors[site].dense()
            torch.testing.assert_close(self.toy.weight(site).detach(), wanted.to(self.dtype))


_PLAN = settings(deadline=None, derandomize=True, max_examples=25, stateful_step_count=12)


def _history(dtype):
    case = type(f"History_{str(dtype).removeprefix('torch.')}", (History,), {"dtype": dtype}).TestCase
    case.settings = _PLAN
    return case


TestHistoryFloat32 = _history(torch.float32)
TestHistoryFloat16 = _history(torch.float16)
TestHistoryBFloat16 = _history(torch.bfloat16)
