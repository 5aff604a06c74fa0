"""Proves that a subject's tokens are found by character offsets: through merges, case, accents and repetition, and that
what the encoder cannot read is refused. The oracle decodes the tokens of the span back into text."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from diffedit.backends.spans import subject_span
from diffedit.errors import RequestError, SubjectNotFoundError, SubjectTruncatedError
from diffedit.site import TokenRule
from diffedit.text import render


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return CLIPTokenizer.from_pretrained(tokenizer_folder)


def decoded(tokenizer, span) -> str:
    ids = tokenizer(span.prompt)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and (span.eos >= 76 or ids[span.eos] == tokenizer.eos_token_id)
    return tokenizer.decode(ids[span.start : span.stop]).strip()


@pytest.mark.parametrize(
    ("prompt", "subject", "seen"),
    [
        ("a photo of a dog", "dog", "dog"),
        ("dog", "dog", "dog"),
        ("a photo of Snoopy, smiling", "Snoopy", "snoopy"),
        ("A DOG AND A CAT", "dog", "dog"),
        ("the Eiffel Tower at night", "eiffel tower", "eiffel tower"),
        ("a category with a cat", "cat", "cat"),
        ("cat's dog", "cat", "cat"),
        ("a  dog \n here", "dog", "dog"),
        ("a café au lait", "café", "café"),
        ("a 犬 here", "犬", "犬"),
        ("a 🦊 here", "🦊", "🦊"),
    ],
)
def test_the_span_decodes_to_the_subject(tokenizer, prompt, subject, seen):
    for form in ("NFC", "NFD"):
        span = subject_span(tokenizer, unicodedata.normalize(form, prompt), unicodedata.normalize(form, subject), 77)
        assert decoded(tokenizer, span) == seen
        assert span.positions(TokenRule.LAST_SUBJECT) == (span.last,) == (span.stop - 1,)
        assert span.positions(TokenRule.ALL_SUBJECT) == tuple(range(span.start, span.stop))
        assert span.positions(TokenRule.EOS) == (span.eos,)


def test_several_tokens_are_one_span(tokenizer):
    """The control: the published rule, "the token before EOS", is another token as soon as text follows."""
    span = subject_span(tokenizer, "Snoopy smiles", "Snoopy", 77)
    assert span.stop - span.start > 1 and span.start == 1
    assert span.last != span.eos - 1
    alone = subject_span(tokenizer, "a Snoopy", "Snoopy", 77)
    assert alone.last == alone.eos - 1


WORDS = st.lists(st.text(alphabet="abcdefg'-,é犬", min_size=1, max_size=5), min_size=1, max_size=5).map(" ".join)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(before=WORDS, subject=st.text(alphabet="xyzXYZ", min_size=1, max_size=8), after=WORDS)
def test_any_prompt(tokenizer, before, subject, after):
    span = subject_span(tokenizer, f"{before} {subject} {after}", subject, 77)
    assert decoded(tokenizer, span) == subject.lower()


def test_two_occurrences(tokenizer):
    prompt = "a dog beside a Dog"
    with pytest.raises(SubjectNotFoundError, match="2 times"):
        subject_span(tokenizer, prompt, "dog", 77)
    first, second = (subject_span(tokenizer, prompt, "dog", 77, n) for n in (0, 1))
    assert first.stop <= second.start and second.stop == second.eos
    assert subject_span(tokenizer, prompt, "dog", 77, -1) == second


@pytest.mark.parametrize("prompt", ["a category", "a hotdog", "dogs", "", "cat"])
def test_no_whole_word(tokenizer, prompt):
    with pytest.raises(RequestError, match=r"does not stand in the prompt|the prompt is empty"):
        subject_span(tokenizer, prompt, "dog", 77)


@pytest.mark.parametrize("words", [80, 76, 75])
def test_a_subject_that_the_encoder_does_not_read_is_refused(tokenizer, words):
    """77 positions hold begin-of-text, 75 tokens and end-of-text."""
    prompt = "a " * (words - 1) + "dog"
    if words <= 75:
        span = subject_span(tokenizer, prompt, "dog", 77)
        assert (span.last, span.eos) == (75, 76)
        return
    with pytest.raises(SubjectTruncatedError, match=rf"'dog' is cut off.*reads 77 tokens: {words + 2} tokens"):
        subject_span(tokenizer, prompt, "dog", 77)


def test_a_subject_cut_in_its_middle_is_refused_but_a_long_tail_is_not(tokenizer):
    with pytest.raises(SubjectTruncatedError):
        subject_span(tokenizer, "a " * 73 + "Snoopy", "Snoopy", 77)
    span = subject_span(tokenizer, "a dog " + "a " * 100, "dog", 77)
    assert (span.last, span.eos) == (2, 76)


@pytest.mark.parametrize("prompt", ["a <|endoftext|> dog", "a <|ENDOFTEXT|> dog", "<|startoftext|>dog"])
def test_a_literal_special_token_is_refused(tokenizer, prompt):
    """The control: the tokenizer itself would end the prompt there."""
    assert tokenizer("a <|endoftext|> dog")["input_ids"].count(tokenizer.eos_token_id) == 2
    with pytest.raises(RequestError, match="special token"):
        subject_span(tokenizer, prompt, "dog", 77)


@pytest.mark.parametrize("template", ["{}", "a photo of a {}", "a {} in the style of a dog"])
def test_render_and_span_agree(tokenizer, template):
    prompt, start = render(template, "owl")
    span = subject_span(tokenizer, prompt, "owl", 77)
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    assert offsets[span.start][0] == start and offsets[span.last][1] == start + 3
