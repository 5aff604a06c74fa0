"""From characters to tokens: the token span of a subject, by the offsets that the tokenizer itself reports.

Never "the token before EOS" (right only if the subject ends the prompt) and never by tokenising the subject alone
(byte-pair merges depend on the neighbours).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from diffedit.errors import SubjectTruncatedError
from diffedit.reading import no_whole_word
from diffedit.site import SubjectSpan
from diffedit.text import clean, find, locate

_FEW = 16
_TOGETHER = 512  # prompts in one call: what the tokenizer says of them is gone before the garbage collector counts it


def subject_span(tokenizer: Any, prompt: str, subject: str, length: int, occurrence: int | None = None) -> SubjectSpan:
    """Token positions of `subject` in `prompt`, counted with the begin-of-text token at 0.

    Args:
        tokenizer: a transformers tokenizer that can return offsets (CLIP's always can from transformers 5 on).
        prompt: one prompt.
        subject: text to find as whole words, ignoring case.
        length: number of positions the encoder reads, special tokens included.
        occurrence: which one, if it stands there more than once.

    Raises:
        SubjectNotFoundError: see `diffedit.text.locate`.
        SubjectTruncatedError: a token of the subject lies beyond `length`.
    """
    prompt, subject = clean(prompt, "prompt"), clean(subject, "subject")
    start_char, stop_char = locate(prompt, subject, occurrence)
    encoded = tokenizer(prompt, return_offsets_mapping=True, truncation=False, verbose=False)
    offsets = encoded["offset_mapping"]
    hits = [i for i, (a, b) in enumerate(offsets) if a < b and a < stop_char and b > start_char]
    eos = min(len(offsets), length) - 1
    if not hits or hits[-1] >= eos:
        raise SubjectTruncatedError(
            f"the subject {subject!r} is cut off: the text encoder reads {length} tokens",
            value=f"{len(offsets)} tokens in {prompt[:60]!r}...",
            hint="shorten the prompt or move the subject forward",
        )
    return SubjectSpan(prompt, subject, hits[0], hits[-1] + 1, eos, _cut(encoded["input_ids"], length))


def subject_spans(tokenizer: Any, phrases: Sequence[tuple[str, str, int]], length: int) -> list[SubjectSpan]:
    """`subject_span` for many (prompt, subject, character offset of the subject), in few calls of the tokenizer.

    Raises:
        RequestError: a subject does not stand there as whole words.
        SubjectTruncatedError: see `subject_span`.
    """
    distinct = dict.fromkeys(phrases)
    plain = [phrase for phrase in distinct if _is_plain(*phrase)]
    found: dict[tuple[str, str, int], SubjectSpan] = {}
    for phrase, encoded in zip(plain, _all_encoded(tokenizer, [prompt for prompt, _, _ in plain]), strict=True):
        prompt, subject, begin = phrase
        first, last = encoded.char_to_token(begin), encoded.char_to_token(begin + len(subject) - 1)
        ids = encoded.ids
        eos = min(len(ids), length) - 1
        if first is not None and last is not None and last < eos:
            found[phrase] = SubjectSpan(prompt, subject, first, last + 1, eos, _cut(ids, length))
    for phrase in distinct:
        if phrase not in found:  # text to be normalised first, or an error to be told
            prompt, subject, begin = phrase
            starts = [first for first, _ in find(prompt, subject)]
            if begin not in starts:
                raise no_whole_word(prompt)
            found[phrase] = subject_span(tokenizer, prompt, subject, length, starts.index(begin))
    return [found[phrase] for phrase in phrases]


def _all_encoded(tokenizer: Any, prompts: list[str]) -> Iterator[Any]:
    """The encodings of any number of prompts; a thread encodes the next part while this one is looked at."""
    if len(prompts) <= _TOGETHER:
        yield from _encode(tokenizer, prompts)
        return
    parts = [prompts[start : start + _TOGETHER] for start in range(0, len(prompts), _TOGETHER)]
    with ThreadPoolExecutor(1, "diffedit-tokens") as pool:
        ahead = pool.submit(_encode, tokenizer, parts[0])
        for part in parts[1:]:
            ready = ahead.result()
            ahead = pool.submit(_encode, tokenizer, part)
            yield from ready
        yield from ahead.result()


def _encode(tokenizer: Any, prompts: list[str]) -> list[Any]:
    """The encodings of whole prompts by the tokenizer's own backend.

    What transformers puts around it takes more time than it does itself, and for a few prompts waking its threads too.
    """
    backend = tokenizer.backend_tokenizer
    if backend.padding is not None:  # left over from another call; transformers sets both anew in each
        backend.no_padding()
    if backend.truncation is not None:
        backend.no_truncation()
    encoded: list[Any] = [backend.encode(p) for p in prompts] if len(prompts) <= _FEW else backend.encode_batch(prompts)
    return encoded


def _is_plain(prompt: str, subject: str, begin: int) -> bool:
    """Whether the text is as `clean` would leave it, with the subject at `begin` as whole words."""
    end = begin + len(subject)
    return (
        begin >= 0
        and prompt[begin:end] == subject
        and bool(subject)
        and subject == subject.strip()
        and prompt == prompt.strip()
        and "  " not in prompt
        and "<|" not in prompt
        and prompt.isascii()
        and prompt.isprintable()
        and not any(ch.isalnum() or ch == "_" for ch in prompt[max(begin - 1, 0) : begin] + prompt[end : end + 1])
    )


def _cut(ids: Sequence[int], length: int) -> tuple[int, ...]:
    """The ids that the encoder reads: a prompt that is too long keeps its end-of-text token."""
    return tuple(ids) if len(ids) <= length else (*ids[: length - 1], ids[-1])
