"""Proves the main job on random-weight pipelines of both families and layouts: an edit makes its layer say what was
asked, moves nothing else by more than the mathematics allow, travels through a folder bit for bit, and can be taken
back."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from diffedit import Editor
from diffedit.edit import Edit
from diffedit.errors import (
    AlreadyAppliedError,
    BaseMismatchError,
    ForeignChangeError,
    NotAppliedError,
    UnsupportedTensorError,
)
from diffedit.ledger import tensor_hash
from diffedit.request import STYLE_TEMPLATES
from diffedit.site import TokenRule
from diffedit.testing import model_state
from tests.tiny import build

EDITED = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"


def root(pipe):
    return getattr(pipe.text_encoder, "text_model", pipe.text_encoder)


def layer(pipe, index=0):
    return root(pipe).encoder.layers[index].self_attn.out_proj


def bits(pipe) -> bytes:
    return layer(pipe).weight.detach().contiguous().view(torch.uint8).numpy().tobytes()


def states(pipe, prompt) -> dict[str, torch.Tensor]:
    """Key, output and the residual stream after layer 0 at the token before end-of-text, by hooks of our own."""
    seen, block = {}, root(pipe).encoder.layers[0]
    handles = [
        layer(pipe).register_forward_hook(lambda m, args, out: seen.update(key=args[0], output=out)),
        block.layer_norm2.register_forward_pre_hook(lambda m, args: seen.update(stream=args[0])),
    ]
    ids = pipe.tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        pipe.text_encoder(ids)
    for handle in handles:
        handle.remove()
    return {name: value[0, -2].detach().double() for name, value in seen.items()}


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("values", "what"), [("stream", "stream"), ("module", "output")])
def test_the_subject_now_gives_what_the_target_gave(pipeline, values, what):
    prompt, goal = "a photo of a dog", "a photo of a cat"
    wanted = states(pipeline, goal)[what]
    assert gap(states(pipeline, prompt)[what], wanted) > 0.2  # control
    edit = Editor(pipeline).ablate("dog", target="cat", updater=build.plain(lam=1e-5, values=values, pair_tol=0))
    assert gap(states(pipeline, prompt)[what], wanted) < 1e-2
    edit.revert()
    assert gap(states(pipeline, prompt)[what], wanted) > 0.2


def test_larger_lam_weakens_the_edit(sd1):
    editor, gaps = Editor(sd1), []
    wanted = states(sd1, "a dog")["stream"]
    for lam in (0.1, 10.0, 1e3, 1e5):
        edit = editor.ablate("dog", target="cat", updater=build.plain(lam=lam))
        gaps.append(gap(states(sd1, "a dog")["stream"], wanted))
        edit.revert()
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.1 * gaps[0]


def test_update_list_and_aliases(sd1):
    editor, updater = Editor(sd1), build.plain(lam=1e-5, pair_tol=0)
    goal = states(sd1, "the owl")["stream"]
    edit = editor.update("flag of Peru", "owl", updater=updater)
    assert edit.requests[0].action == "update"
    assert gap(states(sd1, "the flag of Peru")["stream"], goal) < 2e-2
    editor.revert()
    edit = editor.ablate(["dog", "fox"], target="owl", updater=updater)
    assert [request.subject for request in edit.requests] == ["dog", "fox"]
    assert max(gap(states(sd1, f"the {name}")["stream"], goal) for name in ("dog", "fox")) < 2e-2
    editor.revert()
    assert gap(states(sd1, "the pup")["stream"], goal) > 0.3
    editor.ablate("dog", aliases=["pup"], target="owl", updater=updater)
    assert gap(states(sd1, "the pup")["stream"], goal) < 2e-2


def test_preserve_holds_another_concept_still(sd1):
    editor = Editor(sd1)
    before = states(sd1, "a fox")["output"]
    loose = editor.ablate("dog", target="cat", updater=build.plain())
    moved = gap(states(sd1, "a fox")["output"], before)
    loose.revert()
    updater = build.plain(preserve_weight=1e4, padding_weight=0, pair_tol=0)
    edit = editor.ablate("dog", target="cat", preserve=["fox"], updater=updater)
    held = gap(states(sd1, "a fox")["output"], before)
    assert held < 1e-2 * moved
    assert edit.delta.diagnostics[edit.delta.sites[0]].preserved == 2 * len(
        edit.requests[0].templates
    )  # and ends of text


@pytest.mark.parametrize("other", ["tree", "a red house", "doggy bag", "cat"])
def test_other_prompts_move_no_more_than_their_overlap_with_the_keys(sd1, other):
    """|D x| <= |D| |projection of x on the keys|: a key orthogonal to the subject's is not moved at all."""
    before = states(sd1, other)
    edit = Editor(sd1).ablate("dog", target="cat", updater=build.plain())
    after = states(sd1, other)
    assert torch.equal(before["key"], after["key"])  # nothing upstream of the layer changed
    prompts = [prompt for prompt, _ in edit.requests[0].render("dog")]
    keys = torch.stack([states(sd1, prompt)["key"] for prompt in prompts])
    change = edit.delta.factors[edit.delta.sites[0]].dense()
    basis = torch.linalg.svd(keys, full_matrices=False).Vh
    moved = float((after["output"] - before["output"]).norm())
    assert moved <= float(torch.linalg.matrix_norm(change, 2) * (basis @ before["key"]).norm()) * (1 + 1e-4) + 1e-5
    left = before["key"] - basis.T @ (basis @ before["key"])
    assert float((change @ left).norm()) <= 1e-4 * float(change.norm() * left.norm())


def test_only_the_edited_weight_changes(pipeline):
    torch.manual_seed(3)
    before, random = model_state(pipeline), torch.get_rng_state()
    edit = Editor(pipeline).ablate("Snoopy")
    after = model_state(pipeline)
    changed = [key for key in before if before[key] != after[key]]
    assert len(changed) == 1 and changed[0].endswith("encoder.layers.0.self_attn.out_proj.weight")
    assert before.keys() == after.keys() and torch.equal(random, torch.get_rng_state())
    assert [site.name for site in edit.delta.sites] == [EDITED]
    edit.revert()
    assert model_state(pipeline) == before


def test_a_model_in_training_is_edited_as_it_would_be_used(sd1):
    """Dropout stays out of the keys, the mode stays on, no random number is drawn, gradients are not recorded."""
    calm = Editor(copy.deepcopy(sd1)).ablate("dog", target="cat")
    sd1.text_encoder.train()
    for block in sd1.text_encoder.encoder.layers:
        block.self_attn.dropout = 0.5
    state = torch.get_rng_state()
    with torch.enable_grad():
        edit = Editor(sd1).ablate("dog", target="cat")
    assert edit.id == calm.id and torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in sd1.text_encoder.modules())
    assert layer(sd1).weight.requires_grad and layer(sd1).weight.grad is None


@pytest.mark.parametrize("context", ["autocast", "inference", "float64 default"])
def test_the_callers_context_does_not_matter(sd1, context):
    """Automatic target, numbers and id are the same; an edit made in inference mode can be reverted outside of it."""
    plain = Editor(copy.deepcopy(sd1)).ablate("Snoopy")
    editor, before = Editor(sd1), bits(sd1)
    if context == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            edit = editor.ablate("Snoopy")
    elif context == "inference":
        with torch.inference_mode():
            edit = editor.ablate("Snoopy")
    else:
        torch.set_default_dtype(torch.float64)
        try:
            edit = editor.ablate("Snoopy")
        finally:
            torch.set_default_dtype(torch.float32)
    assert edit.id == plain.id
    assert edit.files()["edit.safetensors"] == plain.files()["edit.safetensors"]
    edit.revert()
    assert bits(sd1) == before


def test_an_automatic_target_is_reported_and_recorded(sd1, caplog):
    with caplog.at_level(logging.INFO, "diffedit"):
        edit = Editor(sd1).ablate("Snoopy")
    target, reason = edit.requests[0].target, edit.manifest.target_reasons[0]
    assert target and "general nouns" in reason
    assert any(repr(target) in record.getMessage() and reason in record.getMessage() for record in caplog.records)
    assert (
        repr(target) in edit.summary() and "given" in Editor(copy.deepcopy(sd1)).ablate("dog", target="cat").summary()
    )


def test_an_automatic_target_is_never_what_is_to_stay(sd1):
    first = Editor(copy.deepcopy(sd1)).ablate("Snoopy").requests[0].target
    kept = Editor(copy.deepcopy(sd1)).ablate("Snoopy", preserve=[first])
    assert kept.requests[0].target != first


def test_an_automatic_target_is_no_subject_of_the_same_edit(sd1):
    """It would be what is being removed: "Snoopy" would go on drawing the monkey that the edit takes out."""
    first = Editor(copy.deepcopy(sd1)).ablate("Snoopy").requests[0].target
    both = Editor(sd1).ablate(["Snoopy", first])
    assert not {r.target for r in both.requests} & {r.subject for r in both.requests}


@pytest.mark.parametrize("subject", ["Van Gogh style", "in the style of Van Gogh", "the style of Van Gogh"])
def test_a_style_is_recognised_and_dropped(sd1, subject):
    request = Editor(sd1).ablate(subject).requests[0]
    assert (request.subject, request.kind, request.target) == ("Van Gogh", "style", "picture")
    assert request.templates == STYLE_TEMPLATES


@pytest.mark.parametrize("subject", ["the A Team", "a café", "C++", "'s-Hertogenbosch", "犬", "🦊", "x" * 60])
def test_unusual_subjects_are_edited_saved_and_loaded(sd1, tmp_path, subject):
    pristine = copy.deepcopy(sd1)
    edit = Editor(sd1).ablate(subject, target="cat")
    Editor(pristine).load(edit.save(tmp_path / "edit"))
    assert bits(pristine) == bits(sd1)


def test_a_folder_does_it_again_anywhere_bit_for_bit(pipeline, tokenizer_folder, family, layout, tmp_path):
    """Made in one layout, loaded in the other: the same weights."""
    edit = Editor(pipeline).ablate("Snoopy", preserve=["fox"])
    folder = edit.save(tmp_path / "edit")
    other = build.pipeline(tokenizer_folder, family=family, layout={"flat": "nested", "nested": "flat"}[layout])
    before = bits(other)
    editor = Editor(other)
    loaded = editor.load(folder)
    assert bits(other) == bits(pipeline) != before
    assert loaded.id == edit.id and loaded.requests == edit.requests and editor.edits == (loaded,)
    assert loaded.files() == edit.files()
    loaded.revert()
    assert bits(other) == before
    assert Editor(other).load(Edit.load(folder)).applied


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pipelines(sd1, dtype):
    sd1.to(dtype)
    before = bits(sd1)
    wanted = states(sd1, "a photo of a cat")["stream"]
    assert gap(states(sd1, "a photo of a dog")["stream"], wanted) > 0.3
    edit = Editor(sd1).ablate("dog", target="cat", updater=build.plain())
    assert layer(sd1).weight.dtype is dtype and edit.manifest.sites[0].dtype == str(dtype).removeprefix("torch.")
    assert gap(states(sd1, "a photo of a dog")["stream"], wanted) < 0.1
    edit.revert()
    assert bits(sd1) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_copy_of_the_base_takes_the_edit(sd1, tmp_path, dtype):
    half = copy.deepcopy(sd1).to(dtype)
    base = layer(half).weight.detach().clone()
    folder = Editor(sd1).ablate("dog", target="cat").save(tmp_path / "edit")
    edit = Editor(half).load(folder)
    wanted = base.double() + edit.delta.factors[edit.delta.sites[0]].dense()
    assert torch.equal(layer(half).weight, wanted.to(dtype))
    edit.revert()
    assert torch.equal(layer(half).weight, base)


def _other_weights(pipe, folder):
    with torch.no_grad():
        layer(pipe).weight[3, 4] += 1e-3
    return pipe, "other weights at .*out_proj"


def _other_vocabulary(pipe, folder):
    pipe.tokenizer.add_tokens(["newword"])
    return pipe, "another tokenizer"


def _other_family(pipe, folder):
    return build.pipeline(folder, family="sd2"), "another architecture"


@pytest.mark.parametrize("make", [_other_weights, _other_vocabulary, _other_family])
def test_another_base_is_refused_with_both_fingerprints(sd1, tokenizer_folder, tmp_path, make):
    folder = Editor(copy.deepcopy(sd1)).ablate("dog", target="cat").save(tmp_path / "edit")
    other, case = make(sd1, tokenizer_folder)
    before, manifest, mine = model_state(other), Edit.load(folder).manifest, Editor(other).backend.fingerprints()
    prints = [(theirs, mine[part]) for part, theirs in manifest.base.fingerprints.items() if theirs != mine[part]]
    theirs, own = (prints or [(manifest.sites[0].base_sha256["float32"], tensor_hash(layer(other).weight))])[0]
    with pytest.raises(BaseMismatchError, match=case) as caught:
        Editor(other).load(folder)
    assert theirs[:12] in caught.value.value and own[:12] in caught.value.value and theirs != own
    assert "its base is" in caught.value.cause and model_state(other) == before


def test_an_edit_that_is_in_the_weights_already_is_recognised(sd1, tmp_path):
    editor = Editor(sd1)
    edit = editor.ablate("dog", target="cat")
    folder, before = edit.save(tmp_path / "edit"), model_state(sd1)
    for attempt in (lambda: editor.load(edit), lambda: editor.load(folder), lambda: Editor(sd1).load(folder)):
        with pytest.raises(AlreadyAppliedError):
            attempt()
        assert model_state(sd1) == before
    assert editor.edits == (edit,)


def test_edits_add_up_in_any_order_and_are_taken_back_in_any_order(sd1):
    """Each is solved against the pristine weights: the second one does not depend on the first."""
    other, before = copy.deepcopy(sd1), bits(sd1)
    one, two = Editor(sd1), Editor(other)
    dog, fox = one.ablate("dog", target="cat"), one.ablate("fox", target="owl")
    fox2, dog2 = two.ablate("fox", target="owl"), two.ablate("dog", target="cat")
    assert (dog.id, fox.id) == (dog2.id, fox2.id) and bits(sd1) == bits(other)
    assert one.edits == (dog, fox) and two.edits == (fox2, dog2)
    one.revert(dog)
    two.revert(dog2)
    assert bits(sd1) == bits(other) != before and (dog.applied, fox.applied) == (False, True)
    one.load(dog)
    one.revert()
    assert bits(sd1) == before and one.edits == ()


def test_reverting_what_is_not_there_is_refused(sd1):
    editor = Editor(sd1)
    edit = editor.ablate("dog", target="cat")
    with pytest.raises(NotAppliedError):
        Editor(copy.deepcopy(sd1)).revert(edit)
    edit.revert()
    for attempt in (edit.revert, lambda: editor.revert(edit), Edit(edit.manifest, edit.delta).revert):
        with pytest.raises(NotAppliedError):
            attempt()
    editor.revert()  # nothing to take back is no error
    assert not edit.applied


def test_training_between_two_edits_is_not_lost(sd1):
    editor = Editor(sd1)
    edit = editor.ablate("dog", target="cat")
    with torch.no_grad():
        layer(sd1).weight.mul_(1.01)
    before = bits(sd1)
    for attempt in (edit.revert, editor.revert, lambda: editor.ablate("fox", target="owl")):
        with pytest.raises(ForeignChangeError, match="was changed by something else"):
            attempt()
        assert bits(sd1) == before and editor.edits == (edit,)


def test_a_layer_with_an_adapter_is_refused(sd1):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["out_proj"]), sd1.text_encoder)
    before = model_state(sd1)
    with pytest.raises(UnsupportedTensorError, match=r"wrapped by an adapter.*unload_lora_weights"):
        Editor(sd1).ablate("dog", target="cat")
    assert model_state(sd1) == before


def test_weights_made_in_inference_mode_are_refused(sd1):
    with torch.inference_mode():
        frozen = copy.deepcopy(layer(sd1).weight)
        layer(sd1).weight = torch.nn.Parameter(frozen.clone(), requires_grad=False)
    before = bits(sd1)
    with pytest.raises(UnsupportedTensorError, match="inference"):
        Editor(sd1).ablate("dog", target="cat")
    assert bits(sd1) == before


@pytest.mark.parametrize("padded", [False, True])
def test_stopping_early_changes_no_number(pipeline, padded):
    """Against hooks of our own on a full forward pass, at every site."""
    backend, prompts = Editor(pipeline).backend, ["a photo of a dog", "a small fox in the snow"]
    for site in backend.sites():
        block = root(pipeline).encoder.layers[site.layer]
        module = block.self_attn.out_proj if site.path.endswith("out_proj") else block.mlp.fc2
        seen = {}
        handle = module.register_forward_hook(lambda m, a, o, seen=seen: seen.update(x=a[0], y=o))
        ids = pipeline.tokenizer(prompts, padding="max_length" if padded else "longest", return_tensors="pt").input_ids
        with torch.no_grad():
            pipeline.text_encoder(ids)
        handle.remove()
        found = backend.capture(prompts, [site], padded=padded)
        torch.testing.assert_close(found.inputs[site], seen["x"], atol=1e-6, rtol=0)
        torch.testing.assert_close(found.outputs[site], seen["y"], atol=1e-6, rtol=0)


def test_a_forward_hook_of_somebody_else_stays_and_still_sees_everything(sd1):
    calls = []
    handle = layer(sd1).register_forward_hook(lambda *a: calls.append(1))
    edit = Editor(sd1).ablate("dog", target="cat")
    assert calls and len(layer(sd1)._forward_hooks) == 1
    handle.remove()
    edit.revert()


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_true_size_text_encoders_in_both_layouts(tokenizer_folder, family):
    flat, updater = build.pipeline(tokenizer_folder, family=family, true_size=True), build.plain(lam=1e-5)
    site, wanted = Editor(flat).backend.sites()[-1], build.TRUE_SIZE[family]
    assert (site.layer + 1, site.d_out) == (wanted["num_hidden_layers"], wanted["hidden_size"])
    before, goal = layer(flat).weight.detach().clone(), states(flat, "a photo of a cat")["stream"]
    edit = Editor(flat).ablate("Snoopy", target="cat", updater=updater)
    assert gap(states(flat, "a photo of a Snoopy")["stream"], goal) < 0.1
    edited = bits(flat)
    edit.revert()
    assert torch.equal(layer(flat).weight, before)
    flat.text_encoder = build.NestedTextModel(flat.text_encoder)
    again = Editor(flat).ablate("Snoopy", target="cat", updater=updater)
    assert again.id == edit.id and bits(flat) == edited


@pytest.mark.parametrize("rule", list(TokenRule))
def test_every_token_rule_edits(sd1, rule):
    from diffedit.locators.fixed import FixedLocator

    edit = Editor(sd1).ablate("Snoopy", target="cat", locator=FixedLocator(tokens=rule))
    assert edit.manifest.tokens is rule and edit.manifest.sites[0].achieved > 0.99


@pytest.mark.parametrize("layer_index", [0, 2])
@pytest.mark.parametrize("role", ["text.self_attn.out_proj", "text.mlp.fc2"])
def test_every_site_can_be_edited(sd1, layer_index, role):
    from diffedit.locators.fixed import FixedLocator

    before = model_state(sd1)
    edit = Editor(sd1).ablate("dog", target="cat", locator=FixedLocator(layer=layer_index, role=role))
    (site,) = edit.delta.sites
    assert (site.layer, site.role) == (layer_index, role)
    edit.revert()
    assert model_state(sd1) == before


def test_the_same_prompt_and_seed_give_the_same_picture_whatever_else_is_asked_for(sd1):
    editor = Editor(sd1)
    sd1.set_progress_bar_config(disable=False, desc="mine")
    alone = editor.generate("a dog", seeds=7, steps=2)
    many = editor.generate(["a cat", "a dog"], seeds=[1, 7], steps=2, batch_size=3)
    assert len(many) == 4 and many[3].tobytes() == alone[0].tobytes()
    assert sd1._progress_bar_config == {"disable": False, "desc": "mine"}
    edit = editor.ablate("dog", target="cat")
    assert editor.generate("a dog", seeds=7, steps=2)[0].tobytes() != alone[0].tobytes()
    edit.revert()
    assert editor.generate("a dog", seeds=7, steps=2)[0].tobytes() == alone[0].tobytes()
