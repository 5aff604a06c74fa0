"""The UNet's linear layers outside of cross-attention as edit sites: found in order, written to every format, and
`esd-u`, which trains them: stock diffusers and PEFT predict what the edited model predicts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel

from diffedit import Editor
from diffedit.backends.checkpoint import save_checkpoint
from diffedit.backends.ldm import checkpoint_names
from diffedit.backends.unet_linear import LINEAR_ROLES, linear_sites
from diffedit.errors import RequestError, UnsupportedModelError
from diffedit.locators.unet_unconditional import UNetUnconditionalLocator
from diffedit.site import Role
from diffedit.testing import model_state
from tests.finetune.conftest import configure, request
from tests.formats.made import denoise, gap, random_edit
from tests.tiny import build, ldm

TOLERANCE = 1e-5


def true_size():
    with torch.device("meta"):
        return UNet2DConditionModel(
            cross_attention_dim=768, block_out_channels=(32, 64, 128, 128), norm_num_groups=32, attention_head_dim=8
        )


def test_sites_are_all_linear_layers_of_the_blocks_but_cross_attention(pipeline, family):
    backend = Editor(pipeline).backend
    sites = backend.sites(*LINEAR_ROLES)
    wanted = {
        name
        for name, module in pipeline.unet.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attn2." not in name and not name.startswith("time_embedding")
    }
    assert {site.path for site in sites} == wanted and len(sites) == len(wanted)
    assert bool(backend.sites(Role.UNET_PROJECTION)) == (family == "sd2")  # convolutions in Stable Diffusion 1.x
    for site in sites:
        module = pipeline.unet.get_submodule(site.path)
        assert backend.weight(site) is module.weight and backend.bias(site) is module.bias
        assert tuple(module.weight.shape) == (site.d_out, site.d_in)
    modules = {pipeline.unet.get_submodule(site.path): site for site in sites}
    seen: dict[Role, list] = {role: [] for role in LINEAR_ROLES}
    handles = [m.register_forward_hook(lambda m, *a: seen[modules[m].role].append(modules[m].layer)) for m in modules]
    denoise(pipeline)
    for handle in handles:
        handle.remove()
    assert all(layers == sorted(layers) for layers in seen.values()) and seen[Role.UNET_TIME][-1] > 3


def test_a_prompt_has_no_keys_there(sd1):
    backend = Editor(sd1).backend
    site = backend.sites(Role.UNET_SELF_ATTN)[0]
    with pytest.raises(UnsupportedModelError, match="depends on the picture"):
        backend.capture(["a dog"], [site])
    for wrong in ("mid_block.attentions.0.transformer_blocks.0.attn2.to_q", "conv_in", site.path + ".x"):
        with pytest.raises(UnsupportedModelError, match="no such edit site"):
            backend.weight(dataclasses.replace(site, path=wrong))


def test_the_true_block_numbers():
    """Against the original code's numbering, as the tests' own writer of its layout has it."""
    unet = true_size()
    sites = linear_sites(unet)
    assert {role: len([s for s in sites if s.role is role]) for role in LINEAR_ROLES} == {
        Role.UNET_SELF_ATTN: 64,
        Role.UNET_FEED_FORWARD: 32,
        Role.UNET_TIME: 22,
        Role.UNET_PROJECTION: 0,
    }
    for site in sites:
        key = ldm._unet(f"{site.path}.weight", 2, unet.config.up_block_types)
        assert checkpoint_names(site, 2) == (f"model.diffusion_model.{key}",)
    assert checkpoint_names(sites[-1], 2) == ("model.diffusion_model.output_blocks.11.0.emb_layers.1.weight",)


@pytest.fixture
def edited(bases, family, tmp_path):
    """An edit of all these layers; what the model predicts without and with it; its folder."""
    editor = Editor(bases[family])
    plain = denoise(editor.pipeline)
    edit = random_edit(editor, sorted(editor.backend.sites(*LINEAR_ROLES)), size=0.1)
    return editor, plain, denoise(editor.pipeline), edit, edit.save(tmp_path / "edit")


def test_every_adapter_file_is_the_edit_in_stock_libraries(edited, bases, family, tmp_path):
    _, plain, wanted, edit, folder = edited
    assert gap(plain, wanted) > 100 * TOLERANCE
    pipe = StableDiffusionPipeline.from_pretrained(bases[family])
    pipe.load_lora_weights(folder)
    assert gap(denoise(pipe), wanted) < TOLERANCE
    pipe.unload_lora_weights()
    single = edit.export(tmp_path / "edit.safetensors", layout="diffusers").path
    pipe.load_lora_weights(single)
    assert gap(denoise(pipe), wanted) < TOLERANCE
    pipe.unload_lora_weights()
    assert gap(denoise(pipe), plain) < TOLERANCE
    pipe.unet = PeftModel.from_pretrained(pipe.unet, folder, subfolder="unet")
    assert gap(denoise(pipe), wanted) < TOLERANCE


def test_merged_models_hold_it_and_reverting_restores_every_bit(edited, bases, family, tmp_path):
    editor, plain, wanted, edit, folder = edited
    merged = editor.save_pipeline(tmp_path / "merged")
    assert gap(denoise(StableDiffusionPipeline.from_pretrained(merged)), wanted) < TOLERANCE
    edit.revert()
    fresh = model_state(Editor(bases[family]).pipeline)
    assert {k: v for k, v in model_state(editor.pipeline).items() if k.startswith("unet")} == {
        k: v for k, v in fresh.items() if k.startswith("unet")
    }
    other = Editor(bases[family])
    other.load(folder)
    assert torch.equal(denoise(other.pipeline), wanted) and gap(denoise(editor.pipeline), plain) == 0.0


def test_a_single_file_holds_it(sd1, bases, tmp_path):
    source = ldm.write(StableDiffusionPipeline.from_pretrained(bases["sd1"]), tmp_path / "base.safetensors")
    editor = Editor(source, config=str(bases["sd1"]))
    edit = random_edit(editor, sorted(editor.backend.sites(*LINEAR_ROLES)), size=0.1)
    wanted = denoise(editor.pipeline)
    written = save_checkpoint(editor.backend, source, tmp_path / "edited.safetensors")
    assert set(written.values()) == set(edit.delta.sites)
    again = Editor(tmp_path / "edited.safetensors", config=str(bases["sd1"]))
    assert gap(denoise(again.pipeline), wanted) < TOLERANCE


def test_what_esd_u_trained_is_exported_with_the_error_that_it_reports(bases, tmp_path):
    editor = Editor(bases["sd1"])
    before, plain = model_state(editor.pipeline), denoise(editor.pipeline)
    updater = configure("esd-u", rank=3, steps=3, learning_rate=1e-3)
    location = UNetUnconditionalLocator().locate(editor.backend, [])
    exact = configure("esd-u", energy=1.0, steps=3, learning_rate=1e-3).solve(editor.backend, [request()], location)
    edit = editor.run([request()], updater=updater)
    assert edit.manifest.locator.name == "unet-unconditional" and set(edit.delta.sites) == set(location.sites)
    assert all(".attn2." not in site.path for site in edit.delta.sites)
    for site, change in edit.delta:
        dense = exact.factors[site].dense()
        off = float((dense - change.dense()).norm() / dense.norm())
        assert edit.delta.diagnostics[site].truncation_error == pytest.approx(off, rel=1e-3, abs=1e-6)
        assert change.rank == 3 and off < 1
    wanted = denoise(editor.pipeline)
    pipe = StableDiffusionPipeline.from_pretrained(bases["sd1"])
    pipe.load_lora_weights(edit.save(tmp_path / "edit"))
    assert gap(denoise(pipe), wanted) < TOLERANCE < gap(plain, wanted)
    edit.revert()
    assert model_state(editor.pipeline) == before


def test_the_locator_takes_some_kinds_alone(tokenizer_folder):
    backend = Editor(build.pipeline(tokenizer_folder, family="sd2")).backend

    def roles(**settings):
        return {site.role for site in UNetUnconditionalLocator(**settings).locate(backend, []).sites}

    assert roles() == set(LINEAR_ROLES)
    assert roles(self_attention=False, time=False) == {Role.UNET_FEED_FORWARD, Role.UNET_PROJECTION}
    nothing = dict.fromkeys(("self_attention", "feed_forward", "time", "projections"), False)
    with pytest.raises(RequestError, match="no kind of layer"):
        roles(**nothing)
    plain = Editor(build.pipeline(tokenizer_folder)).backend
    only = UNetUnconditionalLocator(**{**nothing, "projections": True})
    with pytest.raises(UnsupportedModelError, match="no such linear layers in the UNet"):
        only.locate(plain, [])
