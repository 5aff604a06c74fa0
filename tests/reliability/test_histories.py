"""Random histories of applying, reverting, saving, loading, composing, exporting and crashing, in three dtypes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from diffedit import ledger
from diffedit.rounding import Rounded
from tests.reliability import histories

RULES = {"applied", "reverted", "saved", "loaded", "scaled", "composed", "taken apart", "exported", "worn as LoRA",
         "saves broken off", "applications broken off", "reverts broken off", "foreign changes noticed"}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    histories.counts.clear()
    yield
    histories.counts.clear()


@pytest.mark.parametrize("dtype", histories.DTYPES, ids=str)
def test_some_histories(dtype: torch.dtype) -> None:
    histories.run(20, dtype)
    assert histories.counts["histories"] >= 20 and histories.counts["applied"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("dtype", histories.DTYPES, ids=str)
def test_many_histories(dtype: torch.dtype) -> None:
    histories.run(167, dtype)
    assert histories.counts["histories"] >= 167 and set(histories.counts) >= RULES
    assert histories.counts["numbers of two roundings"] < 1e-5 * histories.counts["numbers"]


def test_a_ledger_that_is_off_by_one_bit_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: one number, one unit in the last place."""
    exact = ledger.rounded_sum

    def off(*args: object) -> Rounded:
        made = exact(*args)  # type: ignore[arg-type]
        made.weight.view(-1).view(torch.int32)[7] += 1
        return made

    monkeypatch.setattr(ledger, "rounded_sum", off)
    with pytest.raises(AssertionError):
        histories.run(5, torch.float32, shrink=False)


def test_a_ledger_that_subtracts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: undoing by adding the opposite, which is what most programs do, leaves other bits."""

    def revert(self: ledger.Ledger, edit_id: str) -> None:
        with torch.no_grad():
            for site, change in self._active[edit_id]:
                self._backend.weight(site).sub_(change.dense(torch.float32))
                self._written[site] = ledger.tensor_hash(self._backend.weight(site))
        self._active = {key: delta for key, delta in self._active.items() if key != edit_id}

    monkeypatch.setattr(ledger.Ledger, "revert", revert)
    with pytest.raises(AssertionError):
        histories.run(20, torch.float32, shrink=False)
