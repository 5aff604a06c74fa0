"""Other names of a subject: what is found, what is refused, and that nothing else is ever edited by the way."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffedit.aliases import SLIPS, Alias, Expansion, expand, reasons, widen
from diffedit.errors import DiffEditError, RequestError
from diffedit.request import make_request
from diffedit.text import clean, locate, noun


def names(found: Expansion) -> dict[str, str]:
    return {alias.name: alias.reason for alias in found.aliases}


def lowered(name: str) -> list[int]:
    """A tokenizer like CLIP's: lower case, words and "'s" apart, one token a letter, so that no word has its own."""
    return [ord(char) for char in name.lower().replace("'s", " 's")]


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        ("dog", {"dogs": "plural"}),
        ("dogs", {"dog": "singular"}),
        ("butterfly", {"butterflies": "plural"}),
        ("wolf", {"wolves": "plural"}),
        ("mouse", {"mice": "plural"}),
        ("bus", {"buses": "plural"}),
        ("lens", {"lenses": "plural"}),
        ("lenses", {"lens": "singular"}),
        ("sheep", {}),
        ("scissors", {}),
        ("Snoopy", {"Snoopys": "plural", "Snoopies": "plural"}),
        ("Mercedes", {}),
        ("crystal ball", {"crystal balls": "plural", "crystal-ball": "with hyphens", "crystalball": "as one word"}),
        ("R2-D2", {"R2 D2": "with spaces", "R2D2": "as one word"}),
        ("Leonardo da Vinci", {"Leonardo da Vincis": "plural", "Leonardo-da-Vinci": "with hyphens"}),
        ("Pokémon", {"Pokemon": "without accents"}),
        ("日本", {}),
        ("the-rock", {"the-rocks": "plural", "therock": "as one word"}),  # "the rock" would lose its "the"
    ],
)
def test_forms(subject, expected):
    assert names(expand(subject, "forms")) == expected
    assert expand(subject, "none") == Expansion((), ())


def test_a_style_is_not_inflected():
    assert names(expand("pixel art", "forms", kind="style")) == {"pixel-art": "with hyphens", "pixelart": "as one word"}


def test_slips_are_bounded_and_start_inside_the_word():
    found = names(expand("butterfly", "all"))
    slips = {name: reason.removeprefix("misspelt: ") for name, reason in found.items() if reason != "plural"}
    assert slips == {
        "buttrefly": "two letters swapped",
        "butetrfly": "two letters swapped",
        "buttrfly": "a letter left out",
        "buttefly": "a letter left out",
        "butteerfly": "a letter doubled",
        "butterrfly": "a letter doubled",
        "buterfly": "a double letter single",
    }


def test_the_tokenizer_decides_on_case_and_possessive():
    assert names(expand("Dog", "forms", tokens=lowered)) == {"Dogs": "plural"}
    cased = names(expand("dog", "forms", tokens=lambda name: [ord(char) for char in name[::-1]]))
    assert cased == {"dogs": "plural", "dog's": "possessive", "DOG": "in capitals", "Dog": "capitalised"}


def test_a_word_of_its_own_is_no_slip():
    known = {"hose": 1, "hore": 2}  # one token each
    found = expand("horse", "all", tokens=lambda name: [known.get(name, 0)] if name in known else lowered(name))
    assert not {"hose", "hore"} & names(found).keys()
    assert Alias("hose", "misspelt: a letter left out, but a word of its own") in found.dropped
    assert sum("left out" in reason for reason in names(found).values()) == SLIPS, "others take their place"
    assert "hose" not in names(expand("horse", "all", words={"hose"}))
    assert "pin tree" not in names(expand("pine tree", "all", words={"pin"}))


def test_names_of_others_are_dropped_with_the_reason():
    dog, cat = make_request(subject="dog"), make_request(subject="cat", target="dogs", preserve=["cats"])
    wide, notes = widen([dog, cat], "forms", listed=True)
    assert [request.aliases for request in wide] == [(), ()]
    assert notes == [
        "'dogs' is not edited with 'dog': plural, but a target of the edit",
        "'cats' is not edited with 'cat': plural, but to be preserved",
    ]
    wide, notes = widen([make_request(subject="dog"), make_request(subject="dogs")], "forms", listed=False)
    assert [request.names for request in wide] == [("dog",), ("dogs",)]
    assert len(notes) == 2 and "edited already" in notes[0]


def test_a_list_that_nobody_wrote_gives_way_to_a_form_of_the_subject():
    request = make_request(subject="dogs", preserve=["dog", "cat"])
    (wide,), notes = widen([request], "forms", listed=False, known=["dog", "cat"])
    assert wide.aliases == ("dog",) and wide.preserve == ("cat",) and not notes
    glasses = make_request(subject="glasses", preserve=["glass"])
    (wide,), notes = widen([glasses], "forms", listed=False, known=["glasses", "glass"])
    assert wide.aliases == () and wide.preserve == ("glass",)
    assert notes == ["'glass' is not edited with 'glasses': singular, but the model knows it as something else"]


def test_given_names_stay_and_are_not_found_again():
    request = make_request(subject="dog", aliases=["hound", "dogs"])
    (wide,), notes = widen([request], "forms", listed=False)
    assert wide.aliases == ("hound", "dogs") and not notes
    assert reasons(wide) == (Alias("hound", "given"), Alias("dogs", "plural"))
    assert reasons(make_request(subject="dog")) == ()


def test_another_setting_is_refused():
    with pytest.raises(RequestError, match="no such expansion"):
        expand("dog", "some")
    with pytest.raises(RequestError, match="no such expansion"):
        widen([], "form", listed=False)


SUBJECTS = st.one_of(
    st.text(min_size=1, max_size=12),
    st.lists(st.text("abcdeilnorstuyé'", min_size=1, max_size=8), min_size=1, max_size=3).map(" ".join),
    st.lists(st.sampled_from(["Snoopy", "R2-D2", "the", "a", "ice", "cream", "dogs", "'s", "-"]), min_size=1).map(
        "-".join
    ),
)


def cleaned(text: str) -> str | None:
    try:
        return make_request(subject=text).subject
    except DiffEditError:
        return None


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    subjects=st.lists(SUBJECTS.map(cleaned).filter(bool), min_size=1, max_size=3, unique_by=str.casefold),
    how=st.sampled_from(["forms", "all"]),
    kind=st.sampled_from(["object", "style"]),
    listed=st.booleans(),
    data=st.data(),
)
def test_whatever_is_asked_names_stay_apart_and_are_found_as_whole_words(subjects, how, kind, listed, data):
    nearby = [alias.name for subject in subjects for alias in expand(subject, "all", kind=kind).aliases]
    own = {subject.casefold() for subject in subjects}
    chosen = data.draw(st.lists(st.sampled_from(nearby), max_size=3)) if nearby else []
    chosen = [name for name in chosen if name.casefold() not in own]
    target, preserve = (chosen[0] if chosen else None), [n for n in chosen[1:] if n != chosen[0]]
    said = {"target": target, "preserve": preserve, "kind": kind}
    requests = [make_request(subject=subject, **said) for subject in subjects]
    wide, notes = widen(requests, how, listed=listed, known=preserve, general=["nail"], tokens=lowered)
    assert (wide, notes) == widen(requests, how, listed=listed, known=preserve, general=["nail"], tokens=lowered)
    edited = [name.casefold() for request in wide for name in dict.fromkeys(n.casefold() for n in request.names)]
    assert len(set(edited)) == len(edited), "no name belongs to two subjects"
    assert [request.subject for request in wide] == subjects
    assert target is None or target.casefold() not in edited
    kept = {name.casefold() for request in wide for name in request.preserve}
    assert not kept & set(edited)
    if listed:
        assert all(new.preserve == old.preserve for new, old in zip(wide, requests, strict=True))
    for request in wide:
        assert all(alias.reason != "given" for alias in reasons(request))
        for alias in request.aliases:
            assert noun(clean(alias, "alias")) == alias
            for prompt, start in request.render(alias):
                assert locate(prompt, alias, -1)[1] >= start, "found as a whole word"


def test_the_rules_are_read_when_they_are_needed():
    script = "import sys, diffedit.aliases; print('pluralizer' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
