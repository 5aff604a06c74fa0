"""Proves that training never touches the model: parameter objects, flags and modes are back whatever happens."""

from __future__ import annotations

import pytest
import torch

from diffedit import Editor
from diffedit.errors import RequestError, UnsupportedTensorError
from diffedit.site import Role
from diffedit.testing import model_state
from diffedit.updaters.finetune.scratch import scratch
from tests.finetune.conftest import METHODS, configure, locate, request
from tests.tiny import build

PARTS = ("text_encoder", "unet")


def everything(pipeline):
    """Hashes, hooks and modes, and which parameter objects are where, with their flags and gradients."""
    objects = {
        f"{part}.{name}": (id(parameter), parameter.requires_grad, parameter.grad)
        for part in PARTS
        for name, parameter in getattr(pipeline, part).named_parameters()
    }
    return model_state(pipeline), objects, torch.get_rng_state().tolist(), torch.is_grad_enabled()


def sites_of(editor):
    return editor.backend.sites(Role.UNET_CROSS_ATTN_K, Role.TEXT_MLP_OUT)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_the_scope_restores_everything(pipeline, error):
    editor = Editor(pipeline)
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    next(pipeline.unet.parameters()).requires_grad_(False)
    before = everything(pipeline)
    try:
        with scratch(editor.backend, sites_of(editor), PARTS) as room:
            assert not any(child.training for child in pipeline.unet.modules())
            with room.trained():
                live = {id(parameter) for parameter in pipeline.unet.parameters()}
                assert sum(id(copy) in live for copy in room.parameters) == len(
                    editor.backend.sites(sites_of(editor)[-1].role)
                )
                torch.nn.init.ones_(room.parameters[0])
                if error:
                    raise error
    except (RuntimeError, KeyboardInterrupt, GeneratorExit):
        pass
    assert everything(pipeline) == before


def test_an_interrupt_before_the_weights_are_back_is_caught_by_the_scope(editor):
    before = everything(editor.pipeline)
    with pytest.raises(KeyboardInterrupt):
        with scratch(editor.backend, sites_of(editor), PARTS) as room:
            stuck = room.trained()
            stuck.__enter__()  # as if the interrupt came inside its own clean-up
            room.put_back = _interrupted_once(room.put_back)
            stuck.__exit__(None, None, None)
    assert everything(editor.pipeline) == before


def _interrupted_once(call):
    rest = iter([KeyboardInterrupt])

    def wrapped():
        error = next(rest, None)
        if error:
            raise error
        call()

    return wrapped


def test_gradients_are_recorded_for_the_copies_alone(editor):
    sites = editor.backend.sites(Role.UNET_CROSS_ATTN_K)
    with scratch(editor.backend, sites, PARTS) as room, room.trained():
        text = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
        out = editor.pipeline.unet(torch.ones(1, 4, 8, 8), 3, encoder_hidden_states=text, return_dict=False)[0]
        assert out.requires_grad
        out.square().mean().backward()
        assert all(copy.grad is not None and copy.grad.abs().sum() > 0 for copy in room.parameters)
        copies = {id(copy) for copy in room.parameters}
        others = [p for part in PARTS for p in getattr(editor.pipeline, part).parameters() if id(p) not in copies]
        assert not any(p.requires_grad or p.grad is not None for p in others)


def test_outside_of_trained_the_model_is_the_original(editor):
    site = editor.backend.sites(Role.UNET_CROSS_ATTN_V)[0]
    before = model_state(editor.pipeline)
    with scratch(editor.backend, [site], ("unet",)) as room:
        room.set_changes({site: torch.ones(site.d_out, site.d_in, dtype=torch.float64)})
        modes = {key for key in before if key.endswith("mode")}
        assert {k: v for k, v in model_state(editor.pipeline).items() if k not in modes} == {
            k: v for k, v in before.items() if k not in modes
        }
        assert torch.allclose(room.changes()[site], torch.ones(site.d_out, site.d_in, dtype=torch.float64), atol=1e-6)
        with room.trained():
            assert editor.backend.weight(site) is room.parameters[0]
        room.set_changes({})
        assert not room.changes()[site].any()


def test_half_precision_and_nothing_are_refused(tokenizer_folder):
    editor = Editor(build.pipeline(tokenizer_folder))
    editor.pipeline.text_encoder.to(torch.bfloat16)
    with pytest.raises(
        UnsupportedTensorError, match=r"cannot be fine-tuned in torch.bfloat16.*Load the model in float32"
    ):
        with scratch(editor.backend, editor.backend.sites()[:1], PARTS):
            pass
    with pytest.raises(RequestError, match="nothing to train"), scratch(editor.backend, [], PARTS):
        pass


@pytest.mark.parametrize(("method", "error"), [*((name, KeyboardInterrupt) for name in METHODS), ("esd", RuntimeError)])
def test_no_method_leaves_a_trace(editor, method, error):
    before = everything(editor.pipeline)
    updater = configure(method, steps=2)
    location = locate(editor, updater)
    delta = updater.solve(editor.backend, [request(preserve=["fox"])], location)
    assert delta.sites and everything(editor.pipeline) == before

    def stop(step, steps, loss):
        if step == 2:
            raise error

    with pytest.raises(error):
        updater.watched(stop).solve(editor.backend, [request()], location)
    assert everything(editor.pipeline) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_trains_inside_a_callers_no_grad(editor, mode):
    updater = configure("text encoder, embedding", steps=2)
    location = locate(editor, updater)
    outside = updater.solve(editor.backend, [request()], location)
    with mode():
        inside = updater.solve(editor.backend, [request()], location)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(outside.factors[site].up, inside.factors[site].up) for site in outside.sites)
