"""Proves the text rules at the door: what is refused or normalised, where a subject stands, which article fits."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffedit.errors import EmptySubjectError, RequestError, SubjectNotFoundError
from diffedit.text import article, clean, find, locate, noun, render, with_article

PLAN = settings(deadline=None, derandomize=True, max_examples=200)
WORDS = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
LETTERS = st.text(alphabet="abcdefghij", min_size=1, max_size=6)


@pytest.mark.parametrize("blank", ["", " ", "\t\n", "\u2003", "\u00a0 \u3000", "\u200b", "\u2060\ufeff", " \u200d "])
def test_blank_text_is_refused(blank):
    """Invisible characters alone are blank too: nobody can see what was asked."""
    with pytest.raises(EmptySubjectError, match="the subject is empty") as caught:
        clean(blank, "subject")
    assert caught.value.value == repr(blank)


@pytest.mark.parametrize("value", [None, 5, b"dog", ["dog"], 1.5])
def test_what_is_not_text_is_refused_by_type(value):
    with pytest.raises(RequestError, match=f"the target must be text: {type(value).__name__}"):
        clean(value, "target")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("dog\ud800", r"unpaired surrogate.*ud800"),
        ("dog<|endoftext|>", r"special token <\|endoftext\|>"),
        ("<|StartOfText|> dog", r"special token <\|startoftext\|>"),
        ("dog\x00cat", r"control characters.*x00"),
        ("dog\x1b[31m", r"control characters.*x1b"),
    ],
)
def test_text_that_a_tokenizer_or_terminal_misreads_is_refused(text, shown):
    with pytest.raises(RequestError, match=shown):
        clean(text, "subject")


def test_the_special_token_has_to_be_whole():
    assert clean("<|endoftext", "subject") == "<|endoftext"


def test_composed_and_decomposed_accents_are_the_same():
    decomposed = unicodedata.normalize("NFD", "  café\u00a0 au\tlait ")
    assert decomposed != "  café\u00a0 au\tlait "
    assert clean(decomposed, "subject") == "café au lait"


@PLAN
@given(WORDS)
def test_cleaning_is_idempotent_and_leaves_no_outer_space(text):
    try:
        once = clean(text, "subject")
    except RequestError:
        return
    assert clean(once, "subject") == once == once.strip()
    assert unicodedata.is_normalized("NFC", once)


@pytest.mark.parametrize(
    ("phrase", "bare"),
    [
        ("a dog", "dog"),
        ("An owl", "owl"),
        ("THE sun", "sun"),
        ("dog", "dog"),
        ("the", "the"),
        ("a", "a"),
        ("answer", "answer"),
        ("theatre", "theatre"),
        ("a-ha", "a-ha"),
        ("the the", "the"),
        ("an  owl", "owl"),
    ],
)
def test_the_leading_article_goes(phrase, bare):
    assert noun(phrase) == bare


@PLAN
@given(st.lists(st.sampled_from(["a", "the", "an", "A", "team", "dog"]), min_size=1, max_size=4).map(" ".join))
def test_taking_the_article_off_is_idempotent(phrase):
    """A stored request is validated again when an edit file is read: a second pass must not change it."""
    assert noun(noun(phrase)) == noun(phrase)


@pytest.mark.parametrize(
    ("phrase", "word"),
    [
        ("dog", "a"),
        ("owl", "an"),
        ("Owl", "an"),
        ("unicorn", "a"),
        ("uninteresting day", "an"),
        ("umbrella", "an"),
        ("European car", "a"),
        ("one-eyed cat", "a"),
        ("used car", "a"),
        ("ukulele", "a"),
        ("犬", "a"),
        ("7up", "a"),
    ],
)
def test_article(phrase, word):
    assert article(phrase) == word
    assert with_article(phrase) == f"{word} {phrase}"
    assert with_article(f"the {phrase}") == f"the {phrase}"


@pytest.mark.parametrize(
    ("template", "phrase", "prompt"),
    [
        ("a photo of a {}", "owl", "a photo of an owl"),
        ("a photo of an {}", "dog", "a photo of a dog"),
        ("An {} in the sun", "dog", "A dog in the sun"),
        ("A {}", "owl", "An owl"),
        ("{}", "owl", "owl"),
        ("banana {}", "owl", "banana owl"),
        ("a {}-shaped cake", "owl", "an owl-shaped cake"),
        ("a big {}", "owl", "a big owl"),
    ],
)
def test_render_corrects_the_article_in_front_of_the_slot_only(template, phrase, prompt):
    found, start = render(template, phrase)
    assert found == prompt
    assert found[start : start + len(phrase)] == phrase


@PLAN
@given(
    before=st.lists(LETTERS | st.sampled_from(["a", "an"]), max_size=3).map(lambda w: " ".join([*w, ""])),
    phrase=LETTERS,
    after=st.lists(LETTERS, max_size=3).map(lambda w: " ".join(["", *w])),
)
def test_the_offset_of_a_rendered_phrase_is_where_it_stands(before, phrase, after):
    prompt, start = render(before + "{}" + after, phrase)
    assert prompt[start : start + len(phrase)] == phrase
    assert prompt.endswith(after)
    assert (start, start + len(phrase)) in find(prompt, phrase)


@pytest.mark.parametrize(
    ("prompt", "subject", "ranges"),
    [
        ("a cat in a category of cats", "cat", [(2, 5)]),
        ("CAT, cat; (Cat)", "cat", [(0, 3), (5, 8), (11, 14)]),
        ("a C++ book", "C++", [(2, 5)]),
        ("a.b aXb", "a.b", [(0, 3)]),
        ("snake_cat cat2", "cat", []),
        ("New York City", "new york", [(0, 8)]),
        ("caf\u00e9s caf\u00e9", "caf\u00e9", [(6, 10)]),
        ("cat's", "cat", [(0, 3)]),
        ("", "cat", []),
    ],
)
def test_find_takes_whole_words_and_no_pattern(prompt, subject, ranges):
    assert find(prompt, subject) == ranges


@PLAN
@given(st.lists(st.sampled_from(["cat", "Cat", "cats", "dog", "category"]), min_size=1, max_size=6))
def test_find_agrees_with_splitting_into_words(words):
    prompt, starts, at = " ".join(words), [], 0
    for word in words:
        starts += [(at, at + 3)] if word.lower() == "cat" else []
        at += len(word) + 1
    assert find(prompt, "cat") == starts


def test_locate_names_the_nearest_word():
    with pytest.raises(SubjectNotFoundError, match=r"'snopy'.*whole words.*Did you mean 'Snoopy'"):
        locate("a photo of Snoopy", "snopy")


def test_two_occurrences_need_a_choice():
    prompt = "a cat and a cat"
    with pytest.raises(SubjectNotFoundError, match=r"2 times.*occurrence=0"):
        locate(prompt, "cat")
    assert [locate(prompt, "cat", n) for n in (0, 1, -1, -2)] == [(2, 5), (12, 15), (12, 15), (2, 5)]
    for n in (2, -3):
        with pytest.raises(SubjectNotFoundError, match=rf"no occurrence {n} of 'cat': 2 in"):
            locate(prompt, "cat", n)
