"""Proves that what was made fast still gives the same numbers: single tokens read without running the model equal the
plain forward pass, a request's pairs are the same bits alone and in company, thousands of requests save and load."""

from __future__ import annotations

import pytest
import torch

from diffedit import Editor
from diffedit.backends import first_layer, spans
from diffedit.edit import Edit
from diffedit.errors import ContradictionError, ForeignChangeError, RequestError, SwallowedError
from diffedit.interfaces import Backend
from diffedit.ledger import cast_hashes
from diffedit.locators.fixed import FixedLocator
from diffedit.request import make_request
from diffedit.site import Role, TokenRule
from diffedit.updaters import tokens, values
from diffedit.updaters.closed_form import QuickFix
from diffedit.updaters.values import _marks
from tests.tiny import build

PHRASES = [
    ("dog", "dog", 0),
    ("a photo of a dog", "dog", 13),
    ("the old Van Gogh house in Nice", "Van Gogh", 8),
    ("a photo of a cat, not of a dog", "cat", 13),
    ("Snoopy and Snoopy", "Snoopy", 11),
    ("a café at night", "café", 2),
]
LETTERS = "bcdfghjklmnp"
NAMES = [f"{a}{b}{c}o {c}{a}i" for a in LETTERS for b in "aeiou" for c in "mnrst"]


def all_places(backend: Backend):
    return [(span, position) for span in backend.spans(PHRASES) for position in range(1, span.eos + 1)]


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_spans_together_are_the_spans_one_by_one(pipeline):
    backend = Editor(pipeline).backend
    found = backend.spans(PHRASES)
    assert found == Backend.spans(backend, PHRASES)
    for span, (prompt, _, _) in zip(found, PHRASES, strict=True):
        assert list(span.tokens) == pipeline.tokenizer(prompt).input_ids
    for glued in (("hotdog", "dog", 3), ("dog_house", "dog", 0), ("a dog", "dog", 1)):
        with pytest.raises(RequestError, match="no whole word"):
            backend.spans([*PHRASES, glued])
    with pytest.raises(RequestError, match="cut off"):
        backend.spans([*PHRASES, ("a " * 80 + "dog", "dog", 160)])


def test_spans_do_not_depend_on_how_many_prompts_go_into_one_call(sd1, monkeypatch):
    backend = Editor(sd1).backend
    phrases = [(f"a {word} and a fox", word, 2) for word in ("dog", "cat", "Snoopy", "caf\u00e9", "owl")]
    whole = [(span, span.tokens) for span in backend.spans(phrases)]
    for together in (1, 2, 4):
        monkeypatch.setattr(spans, "_TOGETHER", together)
        assert [(span, span.tokens) for span in backend.spans(phrases)] == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_have_one_mark_exactly_if_they_have_the_same_bits(dtype):
    keys = torch.randn(300, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    keys[200:] = keys[:100]
    keys[150:160] = torch.nextafter(keys[:10], torch.full_like(keys[:10], torch.inf))
    keys[160, 3] = 0.0
    keys[161] = keys[160]
    keys[161, 3] = -0.0  # another bit, so another mark
    marks = _marks(keys).tolist()
    bits = [row.tobytes() for row in keys.numpy()]
    assert [marks.index(mark) for mark in marks] == [bits.index(row) for row in bits]
    assert marks == [mark for part in torch.split(keys, 13) for mark in _marks(part).tolist()]


def test_reading_tokens_equals_the_plain_forward_pass(pipeline):
    """Every position of every prompt, at each kind of site: against the forward pass of the whole prompts."""
    backend = Editor(pipeline).backend
    places = all_places(backend)
    for site in backend.sites():
        seen = backend.capture([prompt for prompt, _, _ in PHRASES], [site])
        rows = {prompt: i for i, (prompt, _, _) in enumerate(PHRASES)}
        at = [rows[span.prompt] for span, _ in places], [position for _, position in places]
        for padded in (False, True):
            found = backend.read(places, [site], padded=padded)
            assert gap(found.inputs[site], seen.inputs[site][at]) <= 1e-6
            assert gap(found.streams[site], seen.streams[site][at]) <= 1e-6
        plain = Backend.read(backend, places, [site])
        assert gap(found.inputs[site], plain.inputs[site]) <= 1e-6


def test_two_sites_are_read_at_once(sd1):
    backend = Editor(sd1).backend
    places, sites = all_places(backend), backend.sites()[:2]
    both = backend.read(places, sites)
    for site in sites:
        assert gap(both.inputs[site], backend.read(places, [site]).inputs[site]) <= 1e-6


def test_a_hook_on_the_way_is_not_bypassed(sd1):
    backend = Editor(sd1).backend
    places, (site, *_) = all_places(backend), backend.sites(Role.TEXT_SELF_ATTN_OUT)
    before = backend.read(places, [site]).inputs[site]
    layer = sd1.text_encoder.encoder.layers[0]
    handle = layer.self_attn.v_proj.register_forward_hook(lambda module, args, output: 2 * output)
    doubled = backend.read(places, [site]).inputs[site]
    handle.remove()
    assert gap(doubled, 2 * before) <= 1e-6
    assert torch.equal(backend.read(places, [site]).inputs[site], before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("true_width", [False, True])
def test_a_token_gives_the_same_bits_alone_and_in_company(tokenizer_folder, threads, true_width, monkeypatch):
    if true_width:
        monkeypatch.setattr(build, "TINY", dict(build.TRUE_SIZE["sd1"], num_hidden_layers=2))
    backend = Editor(build.pipeline(tokenizer_folder)).backend
    phrases = [(f"photo of {name}", name, 9) for name in NAMES[: 60 if true_width else 200]]
    places = [(span, span.last) for span in backend.spans(phrases)]
    torch.set_num_threads(threads)
    try:
        (site, *_) = backend.sites(Role.TEXT_SELF_ATTN_OUT)
        assert backend.independent([site]) and not backend.independent([site], padded=True)
        whole = backend.read(places, [site])
        for i in range(0, len(places), 3):
            alone = backend.read([places[i]], [site])
            assert torch.equal(alone.inputs[site][0], whole.inputs[site][i])
            assert torch.equal(alone.streams[site][0], whole.streams[site][i])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("chunk", [2048, 5])
@pytest.mark.parametrize("true_width", [False, True])
def test_a_token_gives_the_same_bits_beside_longer_prompts(tokenizer_folder, chunk, true_width, monkeypatch):
    """Short prefixes are filled up to the longest of their chunk: that must not show."""
    monkeypatch.setattr(first_layer, "_CHUNK", chunk)
    if true_width:
        monkeypatch.setattr(build, "TINY", dict(build.TRUE_SIZE["sd1"], num_hidden_layers=2))
    backend = Editor(build.pipeline(tokenizer_folder)).backend
    long = "the old " * 12
    phrases = [("cat", "cat", 0), (f"{long}cat", "cat", len(long)), *PHRASES]
    places = [(span, position) for span in backend.spans(phrases) for position in range(1, span.eos + 1)]
    (site, *_) = backend.sites(Role.TEXT_SELF_ATTN_OUT)
    whole = backend.read(places, [site])
    for i in range(0, len(places), 5):
        alone = backend.read([places[i]], [site])
        assert torch.equal(alone.inputs[site][0], whole.inputs[site][i])
        assert torch.equal(alone.streams[site][0], whole.streams[site][i])


def test_portions_do_not_show_in_the_pairs(sd1, monkeypatch):
    """However many prompts are read and however many pairs are multiplied together; requests of several sizes."""
    editor, updater = Editor(sd1), QuickFix(eos_weight=0, padding_weight=0)
    requests = [make_request(subject=name, target="cat", preserve=["owl"]) for name in NAMES[:40]]
    requests[3] = make_request(subject="Snoopy", target="cat", aliases=["the beagle"], preserve=["owl", "old dog"])
    requests[7] = make_request(subject="Van Gogh", target="cat", strength=0.5, templates=["a {}"])
    location = FixedLocator(tokens=TokenRule.ALL_SUBJECT).locate(editor.backend, requests)
    ((_, whole),) = updater.solve(editor.backend, requests, location).pairs.items()
    assert len({entry.count for entry in whole.wanted}) > 2
    monkeypatch.setattr(tokens, "PROMPTS", 50)
    monkeypatch.setattr(values, "_PAIRS", 30)
    ((_, parts),) = updater.solve(editor.backend, requests, location).pairs.items()
    for one, other in zip((*whole.wanted, *whole.held), (*parts.wanted, *parts.held), strict=True):
        assert torch.equal(one.keys, other.keys) and one.count == other.count
    for one, other in zip(whole.wanted, parts.wanted, strict=True):
        assert torch.equal(one.residuals, other.residuals)


def test_names_among_other_marks_are_found_as_one_by_one(sd1):
    """The tokens of the first and the last character, against the offsets of all tokens."""
    backend = Editor(sd1).backend
    frames = [
        ("", ""),
        ("a photo of ", ""),
        ("(", ")"),
        ("the ", "'s house, 1990"),
        ("a dog, ", ". A cat"),
        ("5 ", "!"),
    ]
    subjects = [*NAMES[:20], "Snoopy", "R2-D2", "St. John's", "x", "42", "dog , cat", "U.S.A."]
    phrases = [(f"{a}{name}{b}", name, len(a)) for name in subjects for a, b in frames]
    found = backend.spans(phrases)
    assert found == Backend.spans(backend, phrases)
    assert all(span.tokens for span in found)


@pytest.mark.parametrize(
    "updater", [QuickFix(), build.plain(), build.plain(pair_tol=0), QuickFix(eos_weight=0.3, padding_weight=0.1)]
)
@pytest.mark.parametrize("layer", [0, 2])
def test_pairs_are_the_same_bits_alone_and_in_company(sd1, updater, layer):
    editor, names = Editor(sd1), NAMES[:12] if updater.padding_weight or layer else NAMES[:100]
    requests = [make_request(subject=name, target="cat", preserve=["owl"]) for name in names]
    location = FixedLocator(layer=layer).locate(editor.backend, requests)
    ((_, whole),) = updater.solve(editor.backend, requests, location).pairs.items()
    assert len(whole.wanted) == len(names) and len(whole.held) == 1
    for i in (0, 3, len(names) - 1):
        ((_, alone),) = updater.solve(editor.backend, [requests[i]], location).pairs.items()
        for one, other in ((alone.wanted[0], whole.wanted[i]), (alone.held[0], whole.held[0])):
            assert torch.equal(one.keys, other.keys) and one.count == other.count and one.group == other.group
        assert torch.equal(alone.wanted[0].residuals, whole.wanted[i].residuals)


@pytest.mark.parametrize("values", ["stream", "module"])
@pytest.mark.parametrize("bias", [False, True])
def test_residuals_are_what_the_layers_outputs_say(sd1, values, bias):
    """From a full forward pass: y_t - b - W k_s, and x_t - x_s beside it."""
    updater = build.plain(pair_tol=0, values=values)
    object.__setattr__(updater, "_keep_bias", bias)
    editor, request = Editor(sd1), make_request(subject="Snoopy", target="cat", templates=["a {}", "the old {} sits"])
    location = FixedLocator().locate(editor.backend, [request])
    ((site, pairs),) = updater.solve(editor.backend, [request], location).pairs.items()
    rows = []
    for template in request.templates:
        couple = [template.format("Snoopy"), template.format("cat")]
        s, t = (editor.backend.span(p, n).last for p, n in zip(couple, ("Snoopy", "cat"), strict=True))
        seen = editor.backend.capture(couple, [site])
        wanted = seen.outputs[site][1, t] - (0 if bias else editor.backend.bias(site))
        if values == "stream":
            wanted = wanted + seen.streams[site][1, t] - seen.streams[site][0, s]
        rows.append(wanted - editor.backend.weight(site) @ seen.inputs[site][0, s])
    assert gap(pairs.wanted[0].residuals, torch.stack(rows).detach()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_read_in_float32(sd1, dtype):
    """The keys are those of a float32 model with the same, already rounded weights."""
    edit = Editor(sd1.to(dtype)).ablate("Snoopy", target="cat", updater=build.plain())
    assert 0.9 <= edit.manifest.sites[0].achieved <= 1.1
    edit.revert()
    ((_, half),) = edit.delta.pairs.items()
    ((_, full),) = (
        Editor(sd1.to(torch.float32)).ablate("Snoopy", target="cat", updater=build.plain()).delta.pairs.items()
    )
    assert half.wanted[0].keys.dtype is torch.float32
    assert torch.equal(half.wanted[0].keys, full.wanted[0].keys)
    assert torch.equal(half.wanted[0].residuals, full.wanted[0].residuals)


def test_an_edit_that_half_precision_swallows_is_refused(sd1):
    before = sd1.to(torch.bfloat16).text_encoder.encoder.layers[0].self_attn.out_proj.weight.detach().clone()
    with pytest.raises(SwallowedError, match="float32"):
        Editor(sd1).ablate("Snoopy", target="cat", updater=build.plain(lam=1e6))
    assert torch.equal(sd1.text_encoder.encoder.layers[0].self_attn.out_proj.weight, before)


def test_contradictions_are_found_among_many(sd1):
    requests = [make_request(subject=name, target="cat", templates=["my {}"]) for name in NAMES[:150]]
    first = make_request(subject="dog", target="cat", templates=["a {}", "my old {}"])
    second = make_request(subject="old dog", target="bird", templates=["my {}"])
    editor = Editor(sd1)
    with pytest.raises(ContradictionError, match="'dog' and 'old dog'"):
        editor.run([first, *requests, second], updater=build.plain())
    agreeing = make_request(subject="old dog", target="old cat", templates=["my {}"])
    assert len(editor.run([first, *requests, agreeing], updater=build.plain()).requests) == 152


def test_the_end_of_text_rule_holds_for_many(sd1):
    editor = Editor(sd1)
    edit = editor.ablate(NAMES[:40], target="cat", locator=FixedLocator(tokens=TokenRule.EOS))
    assert edit.manifest.sites[0].achieved > 0.99


def test_a_changed_bit_is_noticed_after_a_revert(sd1):
    """The ledger compares bits with its copy instead of hashing; minus zero and NaN count."""
    editor, weight = Editor(sd1), sd1.text_encoder.encoder.layers[0].self_attn.out_proj.weight
    with torch.no_grad():
        weight[0, 0] = 0.0
    edit = editor.ablate("dog", target="cat")
    site = edit.delta.sites[0]
    edit.revert()
    assert editor.ledger.base_hashes(site) == cast_hashes(weight) == edit.manifest.sites[0].base_sha256
    editor.ablate("dog", target="cat")
    editor.revert()
    for value in (-0.0, float("nan"), 1e-45):
        with torch.no_grad():
            weight[0, 0] = value
        with pytest.raises(ForeignChangeError):
            editor.ledger.check(site)
    with torch.no_grad():
        weight[0, 0] = 0.0
    editor.ledger.check(site)


def test_thousands_of_requests_save_and_load(sd1, tmp_path):
    """More text than the reader took at first (1 MiB), and many more rows than the layer has dimensions."""
    words = [f"{name} {last}o" for name in NAMES for last in "bcdfghjk"]
    edit = Editor(sd1).ablate(words, target="cat", templates=["a {}", "the {}"])
    again = Edit.load(edit.save(tmp_path / "many"))
    assert again.id == edit.id and len(again.requests) == 2400
    (a,), (b,) = edit.delta.pairs.values(), again.delta.pairs.values()
    assert torch.equal(a.wanted[-1].keys, b.wanted[-1].keys)
    less = again.without(*words[3:])
    assert [request.subject for request in less.requests] == words[:3]
