"""An edit file that differs in anything from what was saved is refused: every bit, every length, swapped parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random

import pytest
import torch

from diffedit.delta import Delta, LowRank
from diffedit.io.pairs import PAIRS_FILE
from diffedit.site import Role
from tests.reliability import samples
from tests.reliability.reader import SAME, edits, folder_outcome, outcome
from tests.unit.io.conftest import MadeEdit, build, finish, site

KINDS = {"MalformedArtifactError", "IntegrityError"}


@pytest.fixture(scope="module")
def small() -> MadeEdit:
    return edits()[0]


@pytest.fixture(scope="module")
def large() -> MadeEdit:
    """As large as an edit of Stable Diffusion 1.x: 768 x 768, rank 24."""
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(768, 24, generator=generator), torch.randn(24, 768, generator=generator)
    return finish(Delta({site(0, Role.TEXT_SELF_ATTN_OUT, 768, 768): LowRank(up, down)}))


def test_the_intact_files_load(small: MadeEdit, large: MadeEdit) -> None:
    """The control of all the others."""
    assert outcome(small.data) == outcome(large.data) == SAME


def test_every_flipped_bit_is_refused(small: MadeEdit) -> None:
    seen: Counter[str] = Counter()
    data = bytearray(small.data)
    for position in range(8 * len(data)):
        data[position // 8] ^= 1 << position % 8
        seen[outcome(bytes(data))] += 1
        data[position // 8] ^= 1 << position % 8
    assert set(seen) == KINDS and seen.total() == 8 * len(small.data)


def test_flipped_bits_of_a_large_file_are_refused(large: MadeEdit) -> None:
    rng = Random(0)
    seen = Counter(outcome(flip(large.data, rng.sample(range(8 * len(large.data)), 1))) for _ in range(1000))
    assert set(seen) <= KINDS


def test_every_length_is_refused(small: MadeEdit) -> None:
    seen = Counter(outcome(small.data[:length]) for length in range(len(small.data)))
    assert set(seen) == {"MalformedArtifactError"} and seen.total() == len(small.data)


@pytest.mark.parametrize("extra", [1, 7, 8, 64, 4096])
def test_longer_files_are_refused(extra: int, small: MadeEdit) -> None:
    for filler in (bytes(extra), b" " * extra, (small.data * 3)[:extra]):
        assert outcome(small.data + filler) in KINDS
        assert outcome(filler + small.data) != SAME


def test_two_flipped_bits_are_refused(small: MadeEdit) -> None:
    """A weak sum of the bytes would miss some of these."""
    rng = Random(1)
    seen = Counter(outcome(flip(small.data, rng.sample(range(8 * len(small.data)), 2))) for _ in range(2000))
    assert set(seen) == KINDS


def test_changed_and_swapped_bytes_are_refused(small: MadeEdit) -> None:
    rng = Random(2)
    for _ in range(1000):
        data = bytearray(small.data)
        at = rng.randrange(len(data))
        data[at] = (data[at] + rng.randrange(1, 256)) % 256
        assert outcome(bytes(data)) in KINDS
    for _ in range(1000):
        data = bytearray(small.data)
        first, second = rng.sample(range(len(data)), 2)
        data[first], data[second] = data[second], data[first]
        assert outcome(bytes(data)) in KINDS or data == small.data


@pytest.mark.parametrize("size", [4, 16, 64, 512])
def test_swapped_moved_and_zeroed_blocks_are_refused(size: int, small: MadeEdit) -> None:
    rng = Random(size)
    count = len(small.data) // size
    for _ in range(250):
        blocks = [small.data[i * size : (i + 1) * size] for i in range(count)]
        rest = small.data[count * size :]
        first, second = rng.sample(range(count), 2)
        action = rng.randrange(3)
        if action == 0:
            blocks[first], blocks[second] = blocks[second], blocks[first]
        elif action == 1:
            blocks.insert(second, blocks.pop(first))
        else:
            blocks[first] = bytes(size)
        data = b"".join(blocks) + rest
        assert outcome(data) != SAME or data == small.data


def test_tensors_of_equal_shape_cannot_change_places() -> None:
    edit = build([(0, Role.TEXT_SELF_ATTN_OUT, 3, 3, 1), (1, Role.TEXT_SELF_ATTN_OUT, 3, 3, 1)])
    head, payload = edit.data[:-48], edit.data[-48:]
    blocks = [payload[12 * k : 12 * k + 12] for k in range(4)]
    for i in range(4):
        for j in range(i):
            turned = list(blocks)
            turned[i], turned[j] = turned[j], turned[i]
            assert outcome(head + b"".join(turned)) == "IntegrityError"


def test_parts_of_two_edits_do_not_fit_together() -> None:
    first, second = build(seed=0), build(seed=1)
    assert len(first.data) == len(second.data)
    for cut in range(1, len(first.data), 7):
        data = first.data[:cut] + second.data[cut:]
        assert outcome(data) in KINDS or data in (first.data, second.data)


def pairs_outcomes(folder: Path, changed: Iterable[bytes]) -> Counter[str]:
    """What loading an intact edit says beside changed pairs."""
    files = samples.edits(1)[0].files()
    return Counter(folder_outcome(folder, {**files, PAIRS_FILE: data}) for data in changed)


def test_flipped_bits_of_the_pairs_are_refused(tmp_path: Path) -> None:
    data = samples.edits(1)[0].files()[PAIRS_FILE]
    assert pairs_outcomes(tmp_path, [data]) == {SAME: 1}
    head = 8 * (8 + int.from_bytes(data[:8], "little"))
    positions = [*range(0, head, 7), *Random(0).sample(range(head, 8 * len(data)), 300)]
    seen = pairs_outcomes(tmp_path, (flip(data, [position]) for position in positions))
    assert set(seen) == KINDS and seen.total() == len(positions)


def test_cut_swapped_and_foreign_pairs_are_refused(tmp_path: Path) -> None:
    data, other = (edit.files()[PAIRS_FILE] for edit in samples.edits(2))
    head = 8 + int.from_bytes(data[:8], "little")
    assert len(data) == len(other)
    assert set(pairs_outcomes(tmp_path, (data[:length] for length in range(0, len(data), 16)))) == {
        "MalformedArtifactError"
    }
    assert set(pairs_outcomes(tmp_path, [other, data[:head] + other[head:], other[:head] + data[head:]])) <= KINDS
    rows = [data[head + 128 * i : head + 128 * (i + 1)] for i in range((len(data) - head) // 128)]
    turned = (data[:head] + b"".join([*rows[:i], *rows[i:][::-1]]) for i in range(len(rows) - 1))
    assert set(pairs_outcomes(tmp_path, turned)) == {"IntegrityError"}


@pytest.mark.slow
def test_every_flipped_bit_and_every_length_of_the_pairs_is_refused(tmp_path: Path) -> None:
    data = samples.edits(1)[0].files()[PAIRS_FILE]
    seen = pairs_outcomes(tmp_path, (flip(data, [position]) for position in range(8 * len(data))))
    assert set(seen) == KINDS and seen.total() == 8 * len(data)
    assert SAME not in pairs_outcomes(tmp_path, (data[:length] for length in range(len(data))))


def flip(data: bytes, positions: list[int]) -> bytes:
    out = bytearray(data)
    for position in positions:
        out[position // 8] ^= 1 << position % 8
    return bytes(out)
