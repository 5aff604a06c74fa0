"""Stable Diffusion XL's text encoders at true size, random weights: 123 and 695 million parameters, a tiny UNet.

Slow, and needs 5 GB of memory. Says that shapes, names and the size of an edit are those of the real model; what a real
model draws afterwards cannot be seen here.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from diffedit import Editor
from diffedit.errors import UnsupportedModelError
from diffedit.locators.fixed import FixedLocator
from tests.tiny import xl

pytestmark = pytest.mark.slow
PROMPTS = ["a photo of a dog", "a fox"]


@pytest.fixture(scope="module")
def pipe(tokenizer_folder):
    return xl.pipeline(tokenizer_folder, true_size=True)


def test_both_encoders_are_edited_reverted_and_exported_at_true_size(pipe, tmp_path):
    counts = [sum(p.numel() for p in getattr(pipe, part).parameters()) for part in ("text_encoder", "text_encoder_2")]
    assert [round(count / 1e6) for count in counts] == [123, 695]
    editor = Editor(pipe)
    backend = editor.backend
    assert len(backend.sites()) == 2 * 11 + 2 * 31
    sites = FixedLocator().locate(backend, []).sites
    assert [site.d_out for site in sites] == [768, 1280]
    before = xl.embed(pipe, PROMPTS)
    weights = [backend.weight(site).detach().clone() for site in sites]
    assert before[0].shape == (2, 77, 2048) and before[1].shape == (2, 1280)
    edit = editor.ablate("dog", target="cat")
    edited = xl.embed(pipe, PROMPTS)
    assert float((edited[0][0] - before[0][0]).abs().max()) > 0.1
    for site, weight in zip(sites, weights, strict=True):
        assert not torch.equal(backend.weight(site), weight)
    file = edit.export(tmp_path / "lora.safetensors", layout="kohya").path
    assert file.stat().st_size < 2_000_000
    edit.revert()
    assert all(torch.equal(backend.weight(site), weight) for site, weight in zip(sites, weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(xl.embed(pipe, PROMPTS), before, strict=True))
    pipe.load_lora_weights(str(file))
    loaded = xl.embed(pipe, PROMPTS)
    gaps = [float((a - b).norm() / b.norm()) for a, b in zip(loaded, edited, strict=True)]
    pipe.unload_lora_weights()
    assert max(gaps) < 1e-5


def test_without_unet_and_vae_the_text_is_edited_and_pictures_are_refused(pipe):
    text = StableDiffusionXLPipeline(**{**pipe.components, "unet": None, "vae": None}, add_watermarker=False)
    editor = Editor(text)
    edit = editor.ablate("dog", target="cat")
    edit.revert()
    with pytest.raises(UnsupportedModelError, match="without all its parts"):
        editor.save_pipeline("never")
