"""From characters to tokens: the token span of a subject, by the offsets that the tokenizer itself reports.

Never "the token before EOS" (right only if the subject ends the prompt) and never by tokenising the subject alone
(byte-pair merges depend on the neighbours).
"""

from __future__ import annotations

from typing import Any

from diffedit.errors import SubjectTruncatedError
from diffedit.site import SubjectSpan
from diffedit.text import clean, locate


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
    return SubjectSpan(prompt, subject, hits[0], hits[-1] + 1, eos)
