"""Proves on random-weight pipelines what the metric promises: everyday captions move less, what is exact does not move,
the factor is the curve's, and edits still compose, travel and come apart."""

from __future__ import annotations

import pytest
import torch

from diffedit import Editor, compose
from diffedit.edit import Edit
from diffedit.errors import IllConditionedError, NotComposableError, RequestError
from diffedit.linalg.metric import Metric, same_marks
from diffedit.request import make_request
from diffedit.site import Role
from diffedit.tradeoff import draw_trade_off, trade_off
from diffedit.updaters import everyday
from diffedit.updaters.closed_form import GIVE_UP, GIVE_UP_HELD, QuickFix
from diffedit.updaters.everyday import _state, captions
from tests.tiny import build

EXACT_TOL = 1e-5
PRESERVING = [("dog", "owl"), ("Snoopy", "fox")]


@pytest.fixture
def editor(sd1) -> Editor:
    return Editor(sd1)


@pytest.fixture
def wide(tokenizer_folder):
    """A text encoder with more dimensions (768) than the empty prompt has positions."""
    return build.pipeline(tokenizer_folder, family="sd1", true_size=True)


def dense(edit: Edit) -> torch.Tensor:
    (change,) = edit.delta.factors.values()
    return change.dense()


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def encoded(pipe, prompt: str) -> torch.Tensor:
    """What the image model is told: all positions, padded."""
    tokens = pipe.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(tokens)[0].double()


def everyday_inputs(editor: Editor, count: int) -> torch.Tensor:
    (site,) = editor.ablate("dog", target="cat").delta.sites
    editor.revert()
    return torch.cat(list(everyday._inputs(editor.backend, site, count))).double()


def test_everyday_inputs_are_the_captions_tokens_and_some_padding(editor):
    found = everyday_inputs(editor, 60)
    made = captions()
    prompts = [next(made) for _ in range(60)]
    (site,) = (s for s in editor.backend.sites() if s.layer == 0 and s.role.value == "text.self_attn.out_proj")
    seen = editor.backend.capture(prompts, [site], padded=True).inputs[site].double()
    ends = [editor.backend.span(prompt, prompt.split()[0], 0).eos for prompt in prompts]
    tokens = torch.cat([seen[row, : end + 1] for row, end in enumerate(ends)])
    padding = torch.cat([seen[row, end + 1 :] for row, end in enumerate(ends)])
    near = torch.cdist(found, torch.cat([tokens, padding])).min(1)
    assert float(near.values.max()) < 1e-4
    of_tokens = int((torch.cdist(found, tokens).min(1).values < 1e-4).sum())
    assert of_tokens >= len(tokens) and 10 * 60 <= len(found) - len(tokens) <= 14 * 60


def test_everyday_captions_move_less(editor):
    inputs = everyday_inputs(editor, 60)
    moved = {}
    for name, updater in (("held", QuickFix()), ("not", build.plain(eos_weight=0.3))):
        edit = editor.ablate("dog", target="cat", updater=updater)
        moved[name] = float((inputs @ dense(edit).T).norm())
        edit.revert()
    assert moved["held"] < 0.6 * moved["not"]


def test_the_empty_prompt_does_not_move(wide):
    pipe, editor, before = wide, Editor(wide), encoded(wide, "")
    edit = editor.ablate("dog", target="cat")
    assert gap(encoded(pipe, ""), before) > 100 * EXACT_TOL  # control
    edit.revert()
    editor.ablate("dog", target="cat", updater=QuickFix(exact="empty"))
    assert gap(encoded(pipe, ""), before) < EXACT_TOL
    assert gap(encoded(pipe, "a dog")[0, :1], before[0, :1]) < EXACT_TOL  # the begin-of-text token, in any prompt


def test_preserved_names_do_not_move(wide):
    editor, sd1 = Editor(wide), wide
    prompts = [template.format("fox") for template in ("a {}", "the {}")]
    before = [encoded(sd1, prompt) for prompt in prompts]
    said = dict(target="cat", preserve=["fox"], templates=["a {}", "the {}"])
    soft = editor.ablate("dog", **said)
    assert max(gap(encoded(sd1, p)[0, :4], b[0, :4]) for p, b in zip(prompts, before, strict=True)) > 100 * EXACT_TOL
    soft.revert()
    edit = editor.ablate("dog", **said, updater=QuickFix(exact="preserve"))
    for prompt, old in zip(prompts, before, strict=True):
        assert gap(encoded(sd1, prompt)[0, :4], old[0, :4]) < EXACT_TOL  # begin of text, two words, end of text
    assert edit.manifest.sites[0].relative_norm > 0.01


def test_an_edit_without_room_is_refused_and_writes_nothing(editor, sd1):
    before = sd1.text_encoder.state_dict()["encoder.layers.0.self_attn.out_proj.weight"].clone()
    with pytest.raises(IllConditionedError, match=r"nothing of the edit is left: 32 of 32 dimensions"):
        editor.ablate("dog", target="cat", updater=QuickFix(exact="empty"))  # 77 positions in 32 dimensions
    assert torch.equal(sd1.text_encoder.state_dict()["encoder.layers.0.self_attn.out_proj.weight"], before)
    with pytest.raises(RequestError, match="lam = 0"):
        QuickFix(lam=0)
    assert build.plain(lam=0).lam == 0


def test_composing_is_the_joint_solve_in_the_metric(editor):
    said = dict(target="cat", preserve=["owl"])
    a, b = editor.ablate("dog", **said), editor.ablate("Snoopy", **said)
    joint = editor.ablate(["dog", "Snoopy"], **said)
    whole = compose([b, a])
    assert gap(dense(whole), dense(joint)) <= 1e-6
    factors = [edit.manifest.sites[0].diagnostics["factor"] for edit in (whole, joint)]
    assert factors[0] == factors[1] != 1.0
    assert gap(dense(joint.without("Snoopy")), dense(a)) <= 1e-6
    assert gap(dense(a) + dense(b), dense(joint)) > 1e-3  # control: adding is something else


def test_edits_of_different_metrics_do_not_compose(wide):
    editor, exact = Editor(wide), QuickFix(exact="preserve")
    a = editor.ablate("dog", target="cat", preserve=["owl"], templates=["a {}"], updater=exact)
    b = editor.ablate("Snoopy", target="cat", preserve=["fox"], templates=["a {}"], updater=exact)
    with pytest.raises(NotComposableError, match="different metrics"):
        compose([a, b])


def test_many_rows_keep_the_metric_instead_of_spreads(editor, tmp_path):
    names = [f"{first} {last}o" for first in ("dog", "cat", "owl", "fox", "pup") for last in "bcdfghjklmnpqrst"]
    edit = editor.ablate(names, target="bird")
    (pairs,) = edit.delta.pairs.values()
    assert pairs.price is not None and pairs.spreads() is None
    again = Edit.load(edit.save(tmp_path / "many"))
    assert again.id == edit.id and again.files() == edit.files()
    less = again.without(*names[3:])
    editor.revert()
    few = editor.ablate(names[:3], target="bird")
    assert gap(dense(less), dense(few)) <= 1e-5
    assert gap(dense(compose([less, again.without(*names[:3])])), dense(edit)) <= 1e-5


def test_an_edit_with_the_metric_and_one_with_spreads_compose_save_and_load(editor, tmp_path):
    names = [f"{first} {last}o" for first in ("dog", "cat", "owl", "fox", "pup") for last in "bcdfghjklmnpqrst"]
    many, few = editor.ablate(names, target="bird"), editor.ablate("Snoopy", target="bird")
    (large,), (small,) = many.delta.pairs.values(), few.delta.pairs.values()
    assert large.price is not None and small.price is None and small.spreads() is not None
    whole = compose([few, many])
    again = Edit.load(whole.save(tmp_path / "mixed"))
    assert again.files() == whole.files()
    editor.revert()
    assert gap(dense(whole), dense(editor.ablate([*names, "Snoopy"], target="bird"))) <= 1e-5


def test_composed_spreads_have_no_more_rank_than_the_weight(editor):
    names = ["dog", "cat", "owl", "fox", "Snoopy", "car", "tree", "bird"]
    edits = []
    for name in names:
        edits.append(editor.ablate(name, target="house"))
        editor.revert()
    whole = compose(edits)
    (pairs,), (change,) = whole.delta.pairs.values(), whole.delta.factors.values()
    rows = sum(len(entry.keys) for entry in pairs.wanted)
    assert pairs.price is None and rows > change.shape[1] >= change.rank
    assert gap(dense(whole), dense(editor.ablate(names, target="house"))) <= 1e-5


def test_what_exact_excludes_cannot_be_taken_out_again(wide):
    editor, exact = Editor(wide), QuickFix(exact="preserve")
    requests = [make_request(subject=n, target="cat", preserve=[k], templates=["a {}"]) for n, k in PRESERVING]
    edit = editor.run(requests, updater=exact)
    with pytest.raises(NotComposableError, match=r"excludes exactly.*fox"):
        edit.without("Snoopy")
    editor.revert()
    requests = [request.model_copy(update={"preserve": ("owl",)}) for request in requests]
    left = editor.run(requests, updater=exact).without("Snoopy")
    editor.revert()
    assert gap(dense(left), dense(editor.run(requests[:1], updater=exact))) <= 1e-5


def test_metrics_that_differ_by_rounding_are_the_same(editor, sd1):
    site = next(s for s in editor.backend.sites() if s.layer == 0 and s.role.value == "text.self_attn.out_proj")
    inputs = everyday_inputs(editor, 60)
    noise = 1e-7 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = (Metric.of_inputs(0.01, 1e4, [rows]) for rows in (inputs, inputs * (1 + noise)))
    assert not torch.equal(first.root.float(), second.root.float())
    assert same_marks(first.marks, second.marks)
    for other in (Metric.of_inputs(0.02, 1e4, [inputs]), Metric.of_inputs(0.01, 1.1e4, [inputs])):
        assert not same_marks(first.marks, other.marks)
    assert not same_marks(first.marks, Metric.of_inputs(0.01, 1e4, [everyday_inputs(editor, 61)]).marks)
    assert first.root.shape[1] == site.d_in


def test_the_curve_of_a_loaded_edit(editor, tmp_path):
    edit = editor.ablate("dog", target="cat", preserve=["owl", "fox"])
    (curve,) = trade_off(Edit.load(edit.save(tmp_path / "edit")))
    said = edit.manifest.sites[0].diagnostics
    assert curve.chosen.factor == said["factor"] and curve.site == edit.delta.sites[0]
    assert curve.chosen.efficacy == pytest.approx(1 - said["residual"], abs=1e-9)
    assert curve.chosen.preserve_drift == pytest.approx(said["preserve_drift"], abs=1e-9)
    reached, drifts = [p.efficacy for p in curve.points], [p.everyday_drift for p in curve.points]
    assert reached == sorted(reached, reverse=True) and drifts == sorted(drifts, reverse=True)
    assert curve.chosen.efficacy == pytest.approx((1 - GIVE_UP_HELD) * reached[0], abs=0.02)
    inputs = everyday_inputs(editor, 300)
    rms = float((inputs @ dense(edit).T).square().sum(1).mean().sqrt())
    (pairs,) = edit.delta.pairs.values()
    asked = float(torch.cat([e.residuals for e in pairs.wanted]).double().norm()) / said["pairs"] ** 0.5
    assert rms / asked <= curve.chosen.everyday_drift * 1.001  # an upper bound ...
    assert rms / asked >= curve.chosen.everyday_drift * 0.8  # ... and a close one
    data = draw_trade_off((curve,), tmp_path / "new" / "curve.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000
    with pytest.raises(RequestError, match=r"\.png"):
        draw_trade_off((curve,), tmp_path / "curve.txt")


def test_the_automatic_share_depends_on_whether_names_are_held(editor):
    for preserve, share in ((["owl"], GIVE_UP_HELD), ([], GIVE_UP)):
        auto, said = (
            editor.ablate("dog", target="cat", preserve=preserve, updater=QuickFix(give_up=value))
            for value in ("auto", share)
        )
        assert torch.equal(dense(auto), dense(said))
        editor.revert()


def test_what_has_no_curve(editor):
    with pytest.raises(NotComposableError, match="no trade-off"):
        trade_off(editor.ablate("dog", target="cat", updater="time"))
    with pytest.raises(RequestError, match="no trade-off"):
        trade_off(editor.ablate("fox", target="cat", updater=build.plain()))


def test_the_moment_is_measured_once_and_again_when_the_weights_change(editor, sd1, monkeypatch):
    read, calls = type(editor.backend).read, []

    def counted(self, places, *args, **kwargs):
        calls.append(len(places))
        return read(self, places, *args, **kwargs)

    monkeypatch.setattr(type(editor.backend), "read", counted)

    def measured() -> bool:
        calls.clear()
        editor.ablate("dog", target="cat").revert()
        return max(calls) > 1000  # all tokens of the captions

    layer = sd1.text_encoder.encoder.layers
    assert measured() and not measured()
    editor.ablate("fox", target="cat")
    assert not measured()  # an active edit of the site itself does not matter
    with torch.no_grad():
        layer[2].mlp.fc2.weight.mul_(1.1)
    assert not measured()  # later layers do not
    for change in (lambda w: w.mul_(1.01), lambda w: w.data.mul_(0.99)):
        with torch.no_grad():
            change(layer[0].self_attn.q_proj.weight)
        assert measured() and not measured()


def test_the_state_of_the_weights_covers_all_that_a_site_depends_on_and_no_more(editor):
    """The plain way to list them is the component's whole state dict."""
    encoder = editor.pipeline.text_encoder
    for site in editor.backend.sites(Role.TEXT_SELF_ATTN_OUT):
        tensors, _ = _state(editor.backend, site)
        seen = {entry[0] for entry in tensors}
        before = [f"layers.{layer}." for layer in range(site.layer + 1)]
        own = f"layers.{site.layer}.self_attn.out_proj."
        for name in encoder.state_dict():
            reads = ".layers." not in name or any(part in name for part in before)
            assert (name in seen) is (reads and own not in name), name
