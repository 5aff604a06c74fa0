"""The UNet's cross-attention as edit sites: found in order, read as the pipeline computes, edited and reverted to the
bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from diffedit import Editor
from diffedit.backends.loading import load_model
from diffedit.backends.stable_diffusion import SD1
from diffedit.backends.unet_linear import LINEAR_ROLES
from diffedit.errors import UnsupportedModelError, UnsupportedTensorError
from diffedit.locators.fixed import FixedLocator
from diffedit.site import EditSite, Role
from diffedit.testing import model_state, unchanged
from tests.formats.made import KEY, PROMPTS, VALUE, gap, random_edit
from tests.tiny import build

BLOCKS = (
    "down_blocks.0.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
)


def test_sites_come_in_the_order_of_the_forward_pass(pipeline):
    backend = Editor(pipeline).backend
    sites = backend.sites(KEY, VALUE)
    assert [site.path for site in sites] == [
        f"{block}.transformer_blocks.0.attn2.{layer}" for block in BLOCKS for layer in ("to_k", "to_v")
    ]
    assert [site.layer for site in sites] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert backend.sites(KEY) == sites[::2] and backend.sites(VALUE) == sites[1::2]
    order = []
    modules = {pipeline.unet.get_submodule(site.path): site for site in backend.sites(KEY)}
    handles = [m.register_forward_hook(lambda m, *a: order.append(modules[m])) for m in modules]
    width = pipeline.unet.config.cross_attention_dim
    with torch.no_grad():
        pipeline.unet(torch.zeros(1, 4, 8, 8), 1, encoder_hidden_states=torch.zeros(1, 3, width))
    for handle in handles:
        handle.remove()
    assert tuple(order) == backend.sites(KEY)
    for site in sites:
        assert backend.weight(site) is pipeline.unet.get_submodule(site.path).weight
        assert tuple(backend.weight(site).shape) == (site.d_out, site.d_in) and backend.bias(site) is None


def test_without_roles_there_are_the_text_encoders_sites_alone(pipeline):
    backend = Editor(pipeline).backend
    assert {site.component for site in backend.sites()} == {"text_encoder"}
    linear = backend.sites(*LINEAR_ROLES)
    assert backend.sites(*Role) == (*backend.sites(), *backend.sites(KEY, VALUE), *linear)


def test_capture_is_what_the_pipeline_feeds_the_layers(tokenizer_folder, family):
    """Against hooks of our own while the pipeline draws: keys of all 77 positions, at every site and step alike."""
    pipeline = build.pipeline(tokenizer_folder, family=family)
    backend = Editor(pipeline).backend
    sites = backend.sites(KEY, VALUE)
    seen: dict[EditSite, list] = {site: [] for site in sites}
    handles = [
        pipeline.unet.get_submodule(site.path).register_forward_hook(
            lambda m, a, o, site=site: seen[site].append((a[0], o))
        )
        for site in sites
    ]
    pipeline.set_progress_bar_config(disable=True)
    pipeline(PROMPTS, num_inference_steps=2, guidance_scale=1.0, height=16, width=16, output_type="latent")
    for handle in handles:
        handle.remove()
    with unchanged(pipeline, "capture"):
        found = backend.capture(PROMPTS, sites, padded=True)
        short = backend.capture(PROMPTS, sites)
    for site in sites:
        assert len(seen[site]) == 2 and found.inputs[site].shape == (3, 77, site.d_in)
        for inputs, outputs in seen[site]:
            assert gap(found.inputs[site], inputs) < 1e-5 and gap(found.outputs[site], outputs) < 1e-5
        length = short.tokens.shape[1]
        assert length < 77 and gap(short.inputs[site], found.inputs[site][:, :length]) < 1e-5
        assert found.streams[site].shape == found.outputs[site].shape and not found.streams[site].any()


def test_both_components_in_one_capture(pipeline):
    backend = Editor(pipeline).backend
    text, cross = backend.sites()[1:2], backend.sites(KEY)[:1]
    both = backend.capture(PROMPTS, (*text, *cross))
    for sites in (text, cross):
        alone = backend.capture(PROMPTS, sites)
        assert torch.equal(both.inputs[sites[0]], alone.inputs[sites[0]])
        assert torch.equal(both.outputs[sites[0]], alone.outputs[sites[0]])


def test_an_edit_of_the_unet_is_saved_loaded_and_reverted_to_the_bit(sd1, tokenizer_folder, tmp_path):
    editor, before = Editor(sd1), model_state(sd1)
    sites = editor.backend.sites(KEY, VALUE)
    edit = random_edit(editor, sites)
    after = model_state(sd1)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {f"unet.{site.path}.weight" for site in sites}
    other = build.pipeline(tokenizer_folder, family="sd1")
    loaded = Editor(other).load(edit.save(tmp_path / "edit"))
    assert model_state(other) == after and loaded.id == edit.id
    edit.revert()
    assert model_state(sd1) == before
    again = edit.save(tmp_path / "edit", overwrite=True)
    assert sorted(path.name for path in again.iterdir()) == [
        "README.md",
        "edit.safetensors",
        "pytorch_lora_weights.safetensors",
        "unet",
    ]


def test_the_fixed_locator_finds_a_block_of_the_unet(sd1):
    backend = SD1(load_model(sd1))
    location = FixedLocator(role=VALUE, layer=2).locate(backend, [])
    assert [site.path for site in location.sites] == [f"{BLOCKS[2]}.transformer_blocks.0.attn2.to_v"]
    with pytest.raises(UnsupportedModelError, match="cannot edit these sites"):
        Editor(sd1).ablate("dog", target="cat", locator=FixedLocator(role=VALUE, layer=2))


@pytest.mark.parametrize(
    "path",
    [
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_k",
        "mid_block.attentions.9.transformer_blocks.0.attn2.to_k",
        "conv_in",
        "",
    ],
)
def test_what_is_no_cross_attention_of_this_unet_is_refused(sd1, path):
    backend = SD1(load_model(sd1))
    site = dataclasses.replace(backend.sites(KEY)[0], path=path)
    for use in (backend.weight, backend.bias, lambda site: backend.capture(["a dog"], [site])):
        with pytest.raises(UnsupportedModelError, match="no such edit site"):
            use(site)


def test_a_unet_with_an_adapter_is_refused(sd1):
    from peft import LoraConfig

    sd1.unet.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_k"]))
    backend = SD1(load_model(sd1))
    assert len(backend.sites(KEY)) == 4
    with pytest.raises(UnsupportedTensorError, match="wrapped by an adapter"):
        backend.weight(backend.sites(KEY)[0])
    assert backend.weight(backend.sites(VALUE)[0]).ndim == 2


def test_a_unet_that_changes_the_embeddings_first_is_refused(sd1):
    sd1.unet.encoder_hid_proj = torch.nn.Linear(32, 32)
    backend = SD1(load_model(sd1))
    with pytest.raises(UnsupportedModelError, match="transforms the text embeddings"):
        backend.capture(["a dog"], backend.sites(KEY))


def test_a_pipeline_without_a_unet_has_no_such_sites(sd1):
    sd1.unet = None
    backend = SD1(load_model(sd1))
    assert backend.sites(KEY, VALUE) == () and len(backend.sites()) == 6
