"""What an audit of two models found, as frozen records that turn into JSON and into text."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from diffedit.audit.words import WordMoves

# A change of high rank that is smaller than this, relative to the weight, is what repeated rounding leaves behind.
TINY = 1e-5

_LISTED = 5


class TensorDiff(BaseModel):
    """One tensor that differs.

    Attributes:
        name: canonical name, component first.
        state: "changed", "rounding" (nothing but another precision) or "not finite".
        shape: of the tensor.
        base_dtype: as stored in the base, in safetensors' words ("F32").
        edited_dtype: as stored in the edited model.
        norm: |D|, Frobenius norm of the difference.
        relative_norm: |D| / |W|; `None` if the base's tensor is zero.
        rows: number of rows that differ.
        rank: effective rank of D; `None` for vectors.
        rank_is_bound: the rank is at least that.
        full_rank: the highest rank that the shape allows; `None` for vectors.
        noise_floor: largest singular value that rounding explains.
        singular_values: the largest of D.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    state: Literal["changed", "rounding", "not finite"]
    shape: tuple[int, ...]
    base_dtype: str
    edited_dtype: str
    norm: float
    relative_norm: float | None
    rows: int
    rank: int | None
    rank_is_bound: bool
    full_rank: int | None
    noise_floor: float
    singular_values: tuple[float, ...]

    @property
    def component(self) -> str:
        """The part of the pipeline that the tensor belongs to."""
        return self.name.partition(".")[0]

    @property
    def is_noise(self) -> bool:
        """Whether repeated rounding explains the difference, though not a single rounding."""
        if self.state != "changed" or self.rank == 0:
            return True
        return not self.is_low and self.relative_norm is not None and self.relative_norm < TINY

    @property
    def is_low(self) -> bool:
        """Whether D has a low rank: at most a quarter of the possible one."""
        return (
            self.rank is not None
            and self.full_rank is not None
            and not self.rank_is_bound
            and (self.rank * 4 <= self.full_rank)
        )

    @property
    def is_high(self) -> bool:
        """Whether D has at least half of the possible rank."""
        return (
            self.rank is not None
            and self.full_rank is not None
            and (self.rank_is_bound or self.rank * 2 >= self.full_rank)
        )


class NotCompared(BaseModel):
    """Something that could not be compared: a component or some of its tensors, and why."""

    model_config = ConfigDict(frozen=True)

    what: str
    reason: str


class ModelDiff(BaseModel):
    """The audit of one model against another. `model_dump_json()` gives it as JSON.

    Attributes:
        base: name of the base.
        edited: name of the other model.
        compared: number of tensors that both have in one shape.
        identical: how many of them hold the same numbers.
        tensors: those that do not, the largest relative change first.
        only_base: tensors that the edited model lacks.
        only_edited: tensors that the base lacks.
        reshaped: tensors whose shapes differ.
        not_compared: the same in words, and what else could not be looked at.
        words: per changed layer that reads text, how far each word moved.
        overall: the same over all these layers; `None` if no word was run.
        words_unread: words that the text encoder cannot read.
        words_note: why no word was run; `None` if some were.
        guess: what kind of edit it looks like.
        evidence: what the guess rests on.
        differs: whether anything differs by more than rounding; a whole component that one side lacks does not count.
    """

    model_config = ConfigDict(frozen=True)

    base: str
    edited: str
    compared: int
    identical: int
    tensors: tuple[TensorDiff, ...]
    only_base: tuple[str, ...]
    only_edited: tuple[str, ...]
    reshaped: tuple[str, ...]
    not_compared: tuple[NotCompared, ...]
    words: tuple[WordMoves, ...]
    overall: WordMoves | None
    words_unread: tuple[str, ...]
    words_note: str | None
    guess: str
    evidence: tuple[str, ...]
    differs: bool

    @property
    def changed(self) -> tuple[TensorDiff, ...]:
        """The tensors that differ by more than rounding."""
        return tuple(tensor for tensor in self.tensors if tensor.state != "rounding")

    def summary(self) -> str:
        """A few lines for a person."""
        rounded = len(self.tensors) - len(self.changed)
        lines = [
            self.guess,
            f"{self.compared} tensors compared: {self.identical} identical, {rounded} rounding only, "
            f"{len(self.changed)} changed.",
            *(f"  {tensor_line(tensor)}" for tensor in self.changed[:_LISTED]),
        ]
        if len(self.changed) > _LISTED:
            lines.append(f"  and {len(self.changed) - _LISTED} more")
        if self.overall is not None:
            moved = ", ".join(f"{move.word} {move.moved:.1%}" for move in self.overall.top[:_LISTED])
            lines.append(f"Words that moved most: {moved}; median {self.overall.median:.1%}.")
        lines += [f"Not compared: {item.what}: {item.reason}." for item in self.not_compared]
        return "\n".join(lines)


def tensor_line(tensor: TensorDiff) -> str:
    """One changed tensor as text."""
    rank = "" if tensor.rank is None else f"rank {rank_text(tensor)}, "
    return f"{tensor.name}: {rank}{size_text(tensor)}"


def rank_text(tensor: TensorDiff) -> str:
    """The rank as "8 of 768", ">= 144 of 1280" or "below the noise"."""
    if tensor.rank is None:
        return ""
    bound = ">= " if tensor.rank_is_bound else ""
    return f"{bound}{tensor.rank} of {tensor.full_rank}" if tensor.rank else "below the noise"


def size_text(tensor: TensorDiff) -> str:
    """The size of the difference relative to the weight, to three digits."""
    if tensor.state == "not finite":
        return "not finite"
    if tensor.relative_norm is None:
        return f"{tensor.norm:.3g}, from zero" if tensor.norm else ""
    percent = 100 * tensor.relative_norm
    return f"{percent:.1e}%" if percent < 1e-3 else f"{percent:.3g}%"
