"""Stable Diffusion XL: what its UNet really reads is what the backend edits, in both text encoders, whole and exactly.

The reference is always the pipeline's own `encode_prompt`, or what a hook sees in the UNet during a pipeline call.
"""

from __future__ import annotations

import dataclasses
import shutil

import huggingface_hub
import pytest
import torch
from transformers import CLIPTokenizer

from diffedit import Edit, Editor, compose
from diffedit.backends.deferred import unread
from diffedit.backends.families import is_xl, pipeline_class
from diffedit.backends.saving import save_pipeline
from diffedit.backends.sdxl import SDXL
from diffedit.cli.editing import how_to_load
from diffedit.errors import BaseMismatchError, ForeignChangeError, RequestError, UnsupportedModelError
from diffedit.locators.fixed import FixedLocator
from diffedit.request import make_request
from diffedit.site import Role
from diffedit.testing import check_backend, check_locator, check_updater, model_state
from diffedit.updaters.closed_form import QuickFix
from diffedit.updaters.cross_attention import UCE
from tests.tiny import build, xl

PROMPTS = ["a photo of a dog", "Snoopy smiles", "a fox"]
FIRST, SECOND = "text_encoder", "text_encoder_2"


@pytest.fixture
def pipe(tokenizer_folder, layout):
    return xl.pipeline(tokenizer_folder, layout=layout)


@pytest.fixture
def flat(tokenizer_folder):
    return xl.pipeline(tokenizer_folder)


@pytest.fixture(scope="module")
def base(tokenizer_folder, tmp_path_factory):
    """A pipeline folder."""
    return save_pipeline(xl.pipeline(tokenizer_folder), tmp_path_factory.mktemp("xl") / "base")


def test_the_report_names_the_class_that_loads_it_and_reads_nothing_for_that(base, tmp_path):
    editor = Editor(base)
    assert how_to_load(editor, tmp_path)[1].startswith("StableDiffusionXLPipeline.from_pretrained(")
    assert how_to_load(editor, tmp_path / "x.safetensors")[1].startswith("StableDiffusionXLPipeline.from_single_file(")
    assert unread(editor.backend.model.pipeline) is not None


def gap(one, other):
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def test_the_backend_keeps_its_contract(pipe):
    backend = Editor(pipe).backend
    assert isinstance(backend, SDXL)
    check_backend(backend, "a photo of a dog", "dog")
    requests = [make_request(subject="dog", target="cat")]
    location = check_locator(FixedLocator(), backend, requests)
    assert [(site.component, site.layer, site.d_out) for site in location.sites] == [(FIRST, 0, 32), (SECOND, 0, 48)]
    check_updater(QuickFix(), backend, requests)


def test_what_cross_attention_reads_is_what_the_pipeline_computes(flat):
    backend = Editor(flat).backend
    states, pooled = xl.embed(flat, PROMPTS)
    assert torch.equal(backend.hidden(PROMPTS), states)
    assert gap([backend.features(PROMPTS)], [pooled]) < 1e-5
    sites = backend.sites(Role.UNET_CROSS_ATTN_K, Role.UNET_CROSS_ATTN_V)
    assert len(sites) == 2 * (2 + 2 * 2 + 2) and {site.d_in for site in sites} == {80}
    read = {}

    def keep(site):
        return lambda module, args, output: read.__setitem__(site, (args[0], output))

    handles = [flat.unet.get_submodule(site.path).register_forward_hook(keep(site)) for site in sites]
    flat("a photo of a dog", num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    for handle in handles:
        handle.remove()
    seen = backend.capture(["a photo of a dog"], sites, padded=True)
    for site in sites:
        assert gap([seen.inputs[site], seen.outputs[site]], read[site]) < 1e-5
        assert not seen.streams[site].any()


def test_sites_of_both_encoders_and_the_unet_are_captured_in_one_call(flat):
    backend = Editor(flat).backend
    sites = (*backend.sites(), *backend.sites(Role.UNET_CROSS_ATTN_V))
    together = backend.capture(PROMPTS, sites, padded=True)
    assert list(together.inputs) == list(sites)
    for component in (FIRST, SECOND, "unet"):
        own = [site for site in sites if site.component == component]
        alone = backend.capture(PROMPTS, own, padded=True)
        assert all(torch.equal(alone.inputs[site], together.inputs[site]) for site in own)
        assert torch.equal(alone.tokens, together.tokens) == (component != SECOND)
    assert {int(token) for token in alone.tokens[:, -1]} == {flat.tokenizer.pad_token_id}
    second = backend.capture(PROMPTS, [site for site in backend.sites() if site.component == SECOND], padded=True)
    assert {int(token) for token in second.tokens[:, -1]} == {0}


def test_each_encoder_is_padded_with_its_own_token(flat):
    """The second encoder's padding is "!": what is captured there is what the pipeline's own run shows."""
    backend = Editor(flat).backend
    site = next(site for site in backend.sites(Role.TEXT_SELF_ATTN_OUT) if site.component == SECOND)
    seen = {}
    layer = flat.text_encoder_2.text_model.encoder.layers[0].self_attn.out_proj
    handle = layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    xl.embed(flat, PROMPTS)
    handle.remove()
    captured = backend.capture(PROMPTS, [site], padded=True)
    assert gap([captured.inputs[site], captured.outputs[site]], [seen["x"], seen["y"]]) < 1e-6
    flat.tokenizer_2.pad_token = "<|endoftext|>"
    assert gap([Editor(flat).backend.capture(PROMPTS, [site], padded=True).inputs[site]], [seen["x"]]) > 1e-2


def test_a_last_block_does_nothing_and_is_no_site(pipe):
    """Every site moves what the UNet reads; the blocks that are left out move the pooled vector at most."""
    backend = Editor(pipe).backend
    before = xl.embed(pipe, PROMPTS)

    def moved(weight):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        after = xl.embed(pipe, PROMPTS)
        with torch.no_grad():
            weight.copy_(kept)
        return [float((a - b).abs().max()) for a, b in zip(after, before, strict=True)]

    for site in backend.sites():
        states, pooled = moved(backend.weight(site))
        assert states > 1e-3 and (pooled > 1e-3) == (site.component == SECOND)
    last = {}
    for component in (FIRST, SECOND):
        root = getattr(getattr(pipe, component), "text_model", getattr(pipe, component))
        last[component] = moved(root.encoder.layers[-1].self_attn.out_proj.weight)
        site = [site for site in backend.sites() if site.component == component][-1]
        beyond = dataclasses.replace(
            site, layer=site.layer + 1, path=site.path.replace(f".{site.layer}.", f".{site.layer + 1}.")
        )
        for call in (backend.weight, backend.bias, lambda site: backend.capture(PROMPTS, [site])):
            with pytest.raises(UnsupportedModelError, match="does not read the last block") as caught:
                call(beyond)
            assert beyond.name in str(caught.value)
    assert last[FIRST] == [0.0, 0.0]
    assert last[SECOND][0] == 0.0 and last[SECOND][1] > 1e-3


def test_an_edit_makes_the_subject_the_target_in_both_encoders(pipe):
    """After layer 0 the subject's token is in the target's state; before the edit it is far from it, in both."""
    editor = Editor(pipe)
    backend = editor.backend
    sites = FixedLocator().locate(backend, []).sites

    def after_layer(word):
        prompt = f"a photo of a {word}"
        seen, at = backend.capture([prompt], sites), backend.span(prompt, word).last
        return {site.component: (seen.outputs[site] + seen.streams[site])[0, at] for site in sites}

    wanted, before, states = after_layer("cat"), after_layer("dog"), xl.embed(pipe, PROMPTS)
    updater, templates = QuickFix(lam=1e-6, pair_tol=0.0, everyday=0, give_up=None), ["a photo of a {}"]
    edit = editor.ablate("dog", target="cat", updater=updater, templates=templates)
    after = after_layer("dog")
    assert after.keys() == {FIRST, SECOND} and edit.manifest.base.backend == "sdxl"
    for component in (FIRST, SECOND):
        assert float((before[component] - wanted[component]).norm() / wanted[component].norm()) > 0.2
        assert float((after[component] - wanted[component]).norm() / wanted[component].norm()) < 1e-3
    assert gap(xl.embed(pipe, PROMPTS), states) > 1e-2


def test_revert_restores_every_bit_and_a_saved_edit_gives_the_same_weights(pipe, tokenizer_folder, layout, tmp_path):
    editor = Editor(pipe)
    before = model_state(pipe)
    edit = editor.ablate(["dog", "Snoopy"], preserve=["fox"], seed=3)
    assert all(request.target for request in edit.requests)
    assert all("own text encoder" in reason for reason in edit.manifest.target_reasons)
    edited, folder = model_state(pipe), edit.save(tmp_path / "edit")
    changed = {key.split(".")[0] for key in edited if edited[key] != before[key]}
    assert changed == {FIRST, SECOND} and len([key for key in edited if edited[key] != before[key]]) == 2
    edit.revert()
    assert model_state(pipe) == before
    other = xl.pipeline(tokenizer_folder, layout="nested" if layout == "flat" else "flat")
    loaded = Editor(other).load(folder)
    assert loaded.id == edit.id and loaded.files() == edit.files()
    for component in (FIRST, SECOND):
        kinds = [getattr(p, component) for p in (pipe, other)]
        roots = [getattr(kind, "text_model", kind) for kind in kinds]
        editor.load(edit)
        first, second = (root.encoder.layers[0].self_attn.out_proj.weight for root in roots)
        assert torch.equal(first, second)
        editor.revert()
    assert model_state(pipe) == before


def test_edits_compose_and_come_apart_as_if_solved_together(flat):
    editor = Editor(flat)

    def made(*subjects):
        edit = editor.ablate(list(subjects), target="cat", preserve=["fox"])
        edit.revert()
        return edit

    together, dog, snoopy = made("dog", "Snoopy"), made("dog"), made("Snoopy")
    for built in (compose([dog, snoopy]), together):
        for site, change in built.delta:
            assert torch.allclose(change.dense(), together.delta.factors[site].dense(), atol=1e-6)
    for site, change in together.without("Snoopy").delta:
        assert torch.allclose(change.dense(), dog.delta.factors[site].dense(), atol=1e-6)
    assert {site.component for site in together.delta.sites} == {FIRST, SECOND}


def test_a_foreign_change_of_the_second_encoder_is_noticed(flat):
    editor = Editor(flat)
    edit = editor.ablate("dog", target="cat")
    with torch.no_grad():
        flat.text_encoder_2.text_model.encoder.layers[0].self_attn.out_proj.weight[0, 0] += 1
    with pytest.raises(ForeignChangeError, match="text_encoder_2"):
        edit.revert()


@pytest.mark.parametrize(("layer", "components"), [(1, [FIRST, SECOND]), (2, [SECOND])])
def test_other_layers_exist_where_an_encoder_has_them(flat, layer, components):
    location = FixedLocator(layer=layer).locate(Editor(flat).backend, [])
    assert [site.component for site in location.sites] == components


def test_a_layer_that_no_encoder_has_is_an_error(flat):
    with pytest.raises(UnsupportedModelError, match="from 0 to 2"):
        FixedLocator(layer=3).locate(Editor(flat).backend, [])


def test_cross_attention_is_edited_where_the_updater_asks_for_it(flat):
    editor = Editor(flat)
    sites = editor.backend.sites(Role.UNET_CROSS_ATTN_K, Role.UNET_CROSS_ATTN_V)

    def projected(word):
        seen, at = editor.backend.capture([word], sites), editor.backend.span(word, word).last
        return [seen.outputs[site][0, at] for site in sites]

    wanted, before, states = projected("cat"), projected("dog"), xl.embed(flat, PROMPTS)
    edit = editor.ablate("dog", target="cat", updater=UCE(lam=1e-6), templates=["{}"])
    assert set(edit.delta.sites) == set(sites)
    assert gap(xl.embed(flat, PROMPTS), states) == 0.0
    for one, other, goal in zip(projected("dog"), before, wanted, strict=True):
        assert float((one - goal).norm()) < 1e-3 * float((other - goal).norm())


def test_pictures_show_an_edit_of_either_encoder_and_nothing_else(flat):
    editor = Editor(flat)
    settings = dict(seeds=[1, 2], steps=2)
    plain = [image.tobytes() for image in editor.generate(["a photo of a dog"], **settings)]
    edit = editor.ablate("dog", target="cat")
    assert [image.tobytes() for image in editor.generate(["a photo of a dog"], **settings)] != plain
    edit.revert()
    assert [image.tobytes() for image in editor.generate(["a photo of a dog"], **settings)] == plain


def test_tracing_is_refused_and_not_done_on_half_of_the_model(flat):
    editor = Editor(flat)
    with pytest.raises(UnsupportedModelError, match="sdxl cannot be traced"):
        editor.trace("a photo of a dog", "dog")
    with pytest.raises(UnsupportedModelError, match="sdxl cannot be traced"):
        editor.ablate("dog", target="cat", locator="causal-trace")


def test_tokenizers_that_cut_a_subject_differently_are_an_error(flat, tmp_path):
    """A second tokenizer with fewer merges is fine where the positions agree, and refused where they do not."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    build.write_tokenizer(folder)
    merges = (folder / "merges.txt").read_text(encoding="utf-8").replace("do g</w>\n", "")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    flat.tokenizer_2 = CLIPTokenizer.from_pretrained(folder)
    backend = Editor(flat).backend
    same = backend.span("a fox", "fox")
    assert (same.start, same.stop) == (2, 5)
    with pytest.raises(UnsupportedModelError, match="'dog' at different positions"):
        backend.span("a photo of a dog", "dog")


def test_exclamation_marks_have_the_ids_of_each_tokenizer(tokenizer_folder, flat, tmp_path):
    """Saved and loaded again, the second tokenizer takes "!" for its padding token wherever it stands."""
    flat.tokenizer_2.save_pretrained(tmp_path / "tokenizer")
    flat.tokenizer_2 = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    backend = Editor(flat).backend
    prompts = ["wow ! a dog", "a dog ! wow", "a dog"]
    assert flat.tokenizer(prompts[0])["input_ids"] != flat.tokenizer_2(prompts[0])["input_ids"]
    spans = backend.spans([(prompt, "dog", prompt.index("dog")) for prompt in prompts])
    assert spans == [backend.span(prompt, "dog") for prompt in prompts]
    sites = FixedLocator().locate(backend, []).sites
    seen = backend.capture(prompts, sites)
    rows = backend.read([(span, span.last) for span in spans], sites)
    for site in sites:
        for row, span in enumerate(spans):
            assert (
                gap(
                    [rows.inputs[site][row], rows.streams[site][row]],
                    [seen.inputs[site][row, span.last], seen.streams[site][row, span.last]],
                )
                < 1e-5
            )
    second = sites[1]
    wrong = backend._second.read([(spans[0], spans[0].last)], [second])
    assert gap([wrong.inputs[second]], [rows.inputs[second][:1]]) > 1e-2


def test_single_tokens_are_read_as_captured_and_alike_alone_and_in_company(flat):
    backend = Editor(flat).backend
    default, cross = FixedLocator().locate(backend, []).sites, backend.sites(Role.UNET_CROSS_ATTN_V)
    assert backend.independent(default)
    for sites, padded in ((default, True), (backend.sites(), False), (cross, False), ((*default, cross[0]), False)):
        assert not backend.independent(sites, padded=padded)
    spans = backend.spans([("a photo of a dog", "dog", 13), ("the fox", "fox", 4), ("a dog in the park", "dog", 2)])
    places = [(span, span.last) for span in spans]
    for sites, padded in ((default, False), (default, True), ((*backend.sites(), *cross), False)):
        rows = backend.read(places, sites, padded=padded)
        seen = backend.capture([span.prompt for span in spans], sites, padded=padded)
        for row, (span, at) in enumerate(places):
            alone = backend.read([(span, at)], sites, padded=padded)
            for site in sites:
                read = rows.inputs[site][row], rows.streams[site][row]
                assert gap(read, [seen.inputs[site][row, at], seen.streams[site][row, at]]) < 1e-5
                if backend.independent(sites, padded=padded):
                    assert torch.equal(alone.inputs[site][0], read[0]) and torch.equal(alone.streams[site][0], read[1])
    assert backend.positions("a dog", default[0]) == backend.positions("a dog", default[1]) == 77


def test_half_of_a_model_is_not_accepted(flat):
    assert SDXL.accepts(flat)
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        kept = getattr(flat, part)
        setattr(flat, part, None)
        assert not SDXL.accepts(flat)
        setattr(flat, part, kept)
    flat.text_encoder_3 = flat.text_encoder_2
    assert not SDXL.accepts(flat)


def test_edits_do_not_pass_between_models_with_one_encoder_and_with_two(flat, sd1):
    editors = [Editor(flat), Editor(sd1)]
    edits = [editor.ablate("dog", target="cat") for editor in editors]
    for editor, foreign in zip(editors, reversed(edits), strict=True):
        with pytest.raises(BaseMismatchError, match="another architecture"):
            editor.load(foreign.copy())


def test_a_folder_names_its_own_class(base, tokenizer_folder, tmp_path):
    plain = save_pipeline(build.pipeline(tokenizer_folder), tmp_path / "plain")
    assert (is_xl(base), is_xl(plain), is_xl(tmp_path / "missing")) == (True, False, False)
    assert [pipeline_class(path).__name__ for path in (base, plain)] == [
        "StableDiffusionXLPipeline",
        "StableDiffusionPipeline",
    ]
    (plain / "model_index.json").write_text("[1, 2", encoding="utf-8")
    assert not is_xl(plain)


def test_a_folder_is_edited_and_saved_with_nothing_else_changed(base, tmp_path):
    editor = Editor(base)
    assert isinstance(editor.backend, SDXL)
    editor.ablate("dog", target="cat").save(tmp_path / "edit")
    assert unread(editor.backend.model.pipeline) is not None  # an edit of both text encoders needs no UNet
    merged = editor.save_pipeline(tmp_path / "merged")
    before = {path.relative_to(base).as_posix(): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    after = {path.relative_to(merged).as_posix(): path.read_bytes() for path in merged.rglob("*") if path.is_file()}
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"{FIRST}/model.safetensors", f"{SECOND}/model.safetensors"}
    again = pipeline_class(merged).from_pretrained(merged)
    assert gap(xl.embed(again, PROMPTS), xl.embed(editor.pipeline, PROMPTS)) == 0.0


def test_a_hub_id_is_opened_as_what_its_index_says(base, tmp_path, monkeypatch):
    """From the Hub's cache, without a network."""
    commit = "0123456789abcdef" * 2 + "01234567"
    repo = tmp_path / "models--somebody--tiny-xl"
    shutil.copytree(base, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit, encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    editor = Editor("somebody/tiny-xl")
    assert isinstance(editor.backend, SDXL)
    assert (editor.backend.model.source, editor.backend.model.revision) == ("somebody/tiny-xl", commit)


def test_a_single_file_is_edited_and_saved_as_one(base, tokenizer_folder, tmp_path):
    file = xl.single_file(xl.pipeline(tokenizer_folder), tmp_path / "model.safetensors")
    assert is_xl(file)
    editor = Editor(file, config=str(base))
    assert isinstance(editor.backend, SDXL)
    edit = editor.ablate("dog", target="cat")
    merged = editor.save_pipeline(tmp_path / "merged.safetensors")
    before, after = file.read_bytes(), merged.read_bytes()
    assert len(before) == len(after) and before != after
    again = Editor(merged, config=str(base))
    assert gap(xl.embed(again.pipeline, PROMPTS), xl.embed(editor.pipeline, PROMPTS)) == 0.0
    edit.revert()
    fresh = Editor(file, config=str(base))
    assert gap(xl.embed(fresh.pipeline, PROMPTS), xl.embed(editor.pipeline, PROMPTS)) == 0.0


def test_only_a_single_file_is_saved_as_one(flat, tmp_path):
    with pytest.raises(UnsupportedModelError, match="only a single-file model"):
        Editor(flat).save_pipeline(tmp_path / "new.safetensors")


def test_diffusers_layout_is_for_a_single_file(flat, tmp_path):
    edit = Editor(flat).ablate("dog", target="cat")
    with pytest.raises(RequestError, match="kohya's layout"):
        edit.export(tmp_path / "folder", layout="diffusers")
    with pytest.raises(RequestError, match="no such layout"):
        edit.export(tmp_path / "lora.safetensors", layout="peft")
    assert Edit.load(edit.save(tmp_path / "edit")).id == edit.id
