"""Proves that a request is checked once, completely, with one kind of error, and then cannot change."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from diffedit.errors import ContradictionError, DiffEditError, EmptySubjectError, RequestError
from diffedit.request import OBJECT_TEMPLATES, STYLE_TEMPLATES, Request, make_request

GOOD = dict(subject="dog", target="cat")
REFUSED = {
    "empty subject": (dict(subject=""), EmptySubjectError, "the subject is empty: ''"),
    "blank subject": (dict(subject=" \n"), EmptySubjectError, r"the subject is empty: ' \\n'"),
    "no subject": (dict(subject=None), RequestError, "the subject must be text: NoneType"),
    "number": (dict(subject=7), RequestError, "the subject must be text: int"),
    "empty target": (dict(target=""), EmptySubjectError, "the target is empty"),
    "target is the subject": (dict(target="Dog"), ContradictionError, "'Dog'"),
    "target is the subject with article": (dict(target="the dog"), ContradictionError, "the target is the subject"),
    "target is an alias": (dict(aliases=["cat"]), ContradictionError, "'cat'"),
    "update without target": (dict(action="update", target=None), RequestError, "an update needs a target: 'dog'"),
    "unknown action": (dict(action="erase"), RequestError, "action is not valid: 'erase'"),
    "unknown kind": (dict(kind="mood"), RequestError, "kind is not valid: 'mood'"),
    "alias as text": (dict(aliases="hound"), RequestError, r"aliases must be a list of names: 'hound'.*\['hound'\]"),
    "preserve as text": (dict(preserve="wolf"), RequestError, "preserve must be a list of names"),
    "no list of aliases": (dict(aliases=None), RequestError, "aliases must be a list of names: None"),
    "number as preserve": (dict(preserve=5), RequestError, "preserve must be a list of names: 5"),
    "names that can be read once only": (dict(preserve=iter(["fox"])), RequestError, "preserve must be a list"),
    "names without an order": (dict(aliases={"hound"}), RequestError, "aliases must be a list of names"),
    "blank alias": (dict(aliases=["hound", " "]), EmptySubjectError, "the alias is empty"),
    "number in preserve": (dict(preserve=[3]), RequestError, "the preserve entry must be text: int"),
    "preserve holds the subject": (dict(preserve=["DOG"]), ContradictionError, "'DOG'"),
    "preserve holds an alias": (dict(aliases=["hound"], preserve=["a hound"]), ContradictionError, "'hound'"),
    "template without a place": (dict(templates=["a photo"]), RequestError, "'a photo'.*no place"),
    "template with two places": (dict(templates=["{} {}"]), RequestError, "ambiguous"),
    "template with a named place": (dict(templates=["{} {x}"]), RequestError, r"'\{\} \{x\}'"),
    "empty template": (dict(templates=[""]), RequestError, "exactly one"),
    "templates as text": (dict(templates="a {}"), RequestError, "templates is not valid: 'a {}'"),
    "template with a control character": (dict(templates=["a\x07 {}"]), RequestError, "control characters"),
    "fractional seed": (dict(seed=1.5), RequestError, "seed is not valid: 1.5"),
    "unknown field": (dict(power=2), RequestError, "power is not valid: 2"),
    "surrogate": (dict(subject="\ud83d"), RequestError, "surrogate"),
    "special token": (dict(target="cat <|endoftext|>"), RequestError, "special token"),
}


@pytest.mark.parametrize(("fields", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(fields, error, message):
    with pytest.raises(error, match=message) as caught:
        make_request(**{**GOOD, **fields})
    assert type(caught.value) is error


def test_a_missing_subject_is_our_error_too():
    with pytest.raises(RequestError, match="subject is not valid"):
        make_request(target="cat")
    with pytest.raises(ValidationError):  # pydantic's own door stays pydantic's
        Request(target="cat")


def test_frozen():
    request = make_request(**GOOD)
    with pytest.raises(ValidationError, match="frozen"):
        request.subject = "fox"
    assert hash(request) == hash(make_request(**GOOD))


def test_defaults_follow_the_kind():
    assert make_request(**GOOD).templates == OBJECT_TEMPLATES
    assert make_request(**GOOD, kind="style").templates == STYLE_TEMPLATES
    assert make_request(**GOOD, templates=["my {}"]).templates == ("my {}",)


def test_text_is_normalised_and_lists_lose_repetitions():
    request = make_request(
        subject=" the  Beagle ",
        target="a cafe\u0301",
        aliases=["a hound", "hound", "pup"],
        preserve=["the wolf", "wolf"],
        templates=["a  {}", "a {}"],
    )
    assert (request.subject, request.target) == ("Beagle", "caf\u00e9")
    assert request.aliases == ("hound", "pup") and request.preserve == ("wolf",) and request.templates == ("a {}",)
    assert request.names == ("Beagle", "hound", "pup")
    assert request.render("owl") == (("an owl", 3),)


NAMES = st.lists(st.sampled_from(["a", "the", "A", "team", "dog", "x"]), min_size=1, max_size=3).map(" ".join)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(NAMES, NAMES, st.lists(NAMES, max_size=2), st.lists(NAMES, max_size=2))
def test_a_stored_request_reads_back_as_itself(subject, target, aliases, preserve):
    """The edit file stores requests as JSON and validates them again; a second validation must change nothing."""
    try:
        request = make_request(subject=subject, target=target, aliases=aliases, preserve=preserve)
    except DiffEditError:
        return
    assert make_request(**request.model_dump()) == request
    assert Request.model_validate_json(request.model_dump_json()) == request
