"""A half-precision model is read as the float32 model with the same weights would be, at every site."""

from __future__ import annotations

import copy

import pytest
import torch

from diffedit import Editor, FixedLocator
from diffedit.backends.precision import widened
from diffedit.site import Role
from diffedit.testing import check_backend, model_state
from tests.tiny import build, xl

HALF = [torch.float16, torch.bfloat16]
PROMPTS = ["a photo of a dog", "an owl", "a very long photo of a fox in the snow"]


@pytest.fixture(params=["sd1", "sd2", "nested", "sdxl"])
def pipe(request, tokenizer_folder):
    if request.param == "sdxl":
        return xl.pipeline(tokenizer_folder)
    family = "sd1" if request.param == "nested" else request.param
    return build.pipeline(tokenizer_folder, family=family, layout="nested" if request.param == "nested" else "flat")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("padded", [False, True])
def test_every_site_shows_what_the_widened_model_shows(pipe, dtype, padded):
    pipe.to(dtype)
    half, full = Editor(pipe).backend, Editor(copy.deepcopy(pipe).to(torch.float32)).backend
    sites = half.sites(Role.TEXT_SELF_ATTN_OUT, Role.TEXT_MLP_OUT, Role.UNET_CROSS_ATTN_K, Role.UNET_CROSS_ATTN_V)
    assert any(site.component == "unet" for site in sites) and any(site.layer > 0 for site in sites)
    half.capture(PROMPTS, sites)  # transformers leaves hooks of its own the first time that hidden states are asked for
    before = model_state(pipe)
    seen, wanted = (backend.capture(PROMPTS, sites, padded=padded) for backend in (half, full))
    for site in sites:
        for kind in ("inputs", "outputs", "streams"):
            got, right = getattr(seen, kind)[site], getattr(wanted, kind)[site]
            assert got.dtype is right.dtype is torch.float32
            assert float((got - right).abs().max()) <= 1e-5 * max(1.0, float(right.abs().max()))
    assert model_state(pipe) == before
    assert all(parameter.dtype is dtype for parameter in pipe.text_encoder.parameters())


@pytest.mark.parametrize("dtype", HALF)
def test_the_model_by_itself_is_coarser(sd1, dtype):
    encoder = sd1.to(dtype).text_encoder
    ids = torch.tensor([[5, 9, 2, 7]])
    with torch.no_grad():
        plain = encoder(input_ids=ids)[0]
        with widened(encoder):
            wide = encoder(input_ids=ids)[0]
        again = encoder(input_ids=ids)[0]
        right = copy.deepcopy(encoder).float()(input_ids=ids)[0]
    assert plain.dtype is dtype and torch.equal(plain, again)  # nothing stays behind
    assert float((wide - right).abs().max()) <= 1e-5 < float((plain.float() - right).abs().max())


def test_a_full_precision_model_is_left_to_itself(sd1):
    ids = torch.tensor([[5, 9, 2, 7]])
    for dtype in (torch.float32, torch.float64):
        encoder = copy.deepcopy(sd1.text_encoder).to(dtype)
        with torch.no_grad(), widened(encoder):
            assert encoder(input_ids=ids)[0].dtype is dtype
    with pytest.raises(RuntimeError, match="stop"), widened(sd1.to(torch.float16).text_encoder):
        raise RuntimeError("stop")
    assert torch.nn.functional.linear(torch.ones(1, 2).half(), torch.ones(3, 2).half()).dtype is torch.float16


@pytest.mark.parametrize("dtype", HALF)
def test_an_edit_of_a_deeper_layer_has_the_widened_models_pairs(sd1, dtype):
    full = copy.deepcopy(sd1.to(dtype)).to(torch.float32)
    locator = FixedLocator(layer=1, role=Role.TEXT_MLP_OUT)
    edits = [Editor(pipe).ablate("dog", target="cat", locator=locator) for pipe in (sd1, full)]
    ((_, half),), ((_, wanted),) = (edit.delta.pairs.items() for edit in edits)
    for name in ("keys", "residuals"):
        got, right = (getattr(pairs.wanted[0], name) for pairs in (half, wanted))
        assert float((got.T @ got - right.T @ right).abs().max()) <= 1e-5 * float((right.T @ right).abs().max())


@pytest.mark.parametrize("dtype", HALF)
def test_backends_keep_their_contract_in_half_precision(pipe, dtype):
    check_backend(Editor(pipe.to(dtype)).backend, "a photo of a dog", "dog")


def test_no_copy_of_the_encoder_is_made(tokenizer_folder):
    from diffedit.metering import TensorMeter

    encoder = build.pipeline(tokenizer_folder).to(torch.float16).text_encoder
    whole = sum(parameter.numel() for parameter in encoder.parameters()) * 4
    with torch.no_grad(), TensorMeter() as meter, widened(encoder):
        encoder(input_ids=torch.tensor([[5]]))
    assert 0 < meter.peak < whole / 4
