"""Proves each method's loss: against its formula by stock parts, lowered by training, and by nothing else."""

from __future__ import annotations

import pytest
import torch

from diffedit import Editor
from diffedit.errors import NonFiniteError, NoOpError, RequestError, UnsupportedModelError
from diffedit.testing import model_state
from diffedit.updaters.finetune.denoising import Denoiser, read, tokenize
from diffedit.updaters.finetune.scratch import scratch
from tests.finetune.conftest import LEFT, METHODS, configure, listening, locate, request
from tests.tiny import xl

TOLERANCE = 1e-5


def same(first, second):
    return first.sites == second.sites and all(
        torch.equal(change.up, second.factors[site].up) and torch.equal(change.down, second.factors[site].down)
        for site, change in first
    )


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_its_own_loss_on_fixed_draws(editor, method):
    updater = configure(method, steps=16, evaluate_every=4, evaluations=2)
    trained = updater.train(editor.backend, [request(preserve=["fox"])], locate(editor, updater))
    losses = [loss for _, loss in trained.training.history]
    assert trained.training.steps == 16 and len(losses) == 5
    assert trained.training.after < LEFT[method] * trained.training.before
    assert trained.loss < LEFT[method] * trained.training.before  # of the low-rank change too
    for site in trained.delta.sites:
        told = trained.delta.diagnostics[site]
        assert (told.loss_before, told.loss_trained) == (losses[0], losses[-1]) and told.loss_after == trained.loss
        assert 0 <= told.truncation_error <= 0.001**0.5 + 1e-12 and 0 < told.relative_norm < 1


@pytest.mark.parametrize("method", METHODS)
def test_a_learning_rate_of_zero_changes_nothing(editor, method):
    """The control: what lowers the loss is the training, not the measuring."""
    seen = []
    updater = configure(method, learning_rate=0.0).watched(lambda *step: seen.append(step))
    with pytest.raises(NoOpError, match="training changed nothing"):
        updater.solve(editor.backend, [request()], locate(editor, updater))
    assert [step for step, _, _ in seen] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides(editor, method):
    updater = configure(method, steps=2)
    location = locate(editor, updater)
    first, again, other = (updater.solve(editor.backend, [request(seed=seed)], location) for seed in (5, 5, -(10**20)))
    assert same(first, again) and not same(first, other)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_denoiser_is_the_pipeline(tokenizer_folder, family):
    """Text, guided sampling and added noise against the stock pipeline and its scheduler."""
    editor = Editor(listening(tokenizer_folder, family, "nested"))
    pipeline = editor.pipeline
    prompts = ["a photo of a dog", "cat"]
    with torch.no_grad():
        denoiser = Denoiser(editor.backend, 4)
        text = denoiser.embed(prompts)
        stock, empty = pipeline.encode_prompt(prompts, "cpu", 1, True)
        assert torch.equal(text, stock) and torch.equal(denoiser.empty.expand(2, -1, -1), empty)
        noise = denoiser.noise(2, torch.Generator().manual_seed(1))
        ours = denoiser.sample(text, noise, guidance=3.0)
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(
            prompts, latents=noise, num_inference_steps=4, guidance_scale=3.0, height=16, width=16, output_type="latent"
        ).images
    assert torch.allclose(ours, theirs, atol=TOLERANCE)
    times = torch.tensor([0, 500])
    assert torch.equal(denoiser.add_noise(ours, noise, times), pipeline.scheduler.add_noise(ours, noise, times))
    velocity = pipeline.scheduler.get_velocity(ours, noise, times)
    assert torch.equal(denoiser.truth(ours, noise, times), velocity if family == "sd2" else noise)
    assert pipeline.scheduler.num_inference_steps == 4 and denoiser.random_times(9, torch.Generator()).max() < 1000


def test_esds_aim_is_the_papers_formula(editor):
    updater = configure("esd", negative_guidance=0.7, batch_size=1)
    unet = editor.pipeline.unet
    with scratch(editor.backend, locate(editor, updater).sites, updater.components()) as room, torch.no_grad():
        lesson = updater.objective(editor.backend, [request()], room).draw(torch.Generator().manual_seed(0))[0]
        empty = editor.pipeline.encode_prompt("", "cpu", 1, False)[0]
        known = [editor.pipeline.encode_prompt(f"{start} dog", "cpu", 1, False)[0] for start in ("a photo of a", "the")]
        assert sum(torch.equal(lesson.text, text) for text in known) == 1
        without = unet(lesson.latents, lesson.times, empty).sample
        conditioned = unet(lesson.latents, lesson.times, lesson.text).sample
    assert torch.allclose(lesson.target, without - 0.7 * (conditioned - without), atol=TOLERANCE)
    assert (conditioned - without).abs().max() > 100 * TOLERANCE  # the text matters


def test_concept_ablation_reads_the_anchor_at_the_same_noise(editor):
    updater = configure("concept ablation", prior_weight=0.5)
    with scratch(editor.backend, locate(editor, updater).sites, updater.components()) as room, torch.no_grad():
        objective = updater.objective(editor.backend, [request(preserve=["fox"])], room)
        objective.prepare({})
        concept, prior, held = objective.draw(torch.Generator().manual_seed(0))
        for row in range(2):
            prompts = [start for start in ("a photo of a", "the")]
            anchors = editor.pipeline.encode_prompt([f"{p} cat" for p in prompts], "cpu", 1, False)[0]
            subjects = editor.pipeline.encode_prompt([f"{p} dog" for p in prompts], "cpu", 1, False)[0]
            which = [i for i in range(2) if torch.equal(prior.text[row], anchors[i])]
            assert len(which) == 1 and torch.equal(concept.text[row], subjects[which[0]])
        predicted = editor.pipeline.unet(concept.latents, concept.times, prior.text).sample
        kept = editor.pipeline.unet(held.latents, held.times, held.text).sample
    assert torch.allclose(concept.target, predicted, atol=TOLERANCE) and torch.allclose(
        held.target, kept, atol=TOLERANCE
    )
    assert torch.equal(concept.latents, prior.latents) and prior.weight == 0.5 and held.weight == 1.0


def test_the_embedding_loss_pairs_the_subjects_tail_with_the_targets(editor):
    """By hand: "a photo of a dog" ends at token 5 in this vocabulary's count, the longer target's tail is shifted."""
    updater = configure("text encoder, embedding", batch_size=64)
    asked = request(target="cat in the pin", templates=("a photo of a {}",))
    pipeline = editor.pipeline
    s = editor.backend.span("a photo of a dog", "dog").last
    t = editor.backend.span("a photo of a cat in the pin", "cat in the pin").last
    assert t > s
    with scratch(editor.backend, locate(editor, updater).sites, updater.components()) as room, torch.no_grad():
        objective = updater.objective(editor.backend, [asked], room)
        loss = float(objective.loss(objective.draw(torch.Generator())))
        moved, goal = read(pipeline, tokenize(pipeline, ["a photo of a dog", "a photo of a cat in the pin"]))
        length = len(moved)
        wanted = torch.stack([goal[min(t + i - s, length - 1)] for i in range(s, length)])
    assert loss == pytest.approx(float((moved[s:] - wanted).square().mean()), rel=1e-4)


def test_preserved_names_hold_still(editor):
    """The same training with and without the preserve loss, measured on a prompt of the preserved name."""
    drift = {}
    for weight in (0.0, 10.0):
        updater = configure("text encoder, embedding", steps=30, preserve_weight=weight)
        edit = editor.run([request(preserve=["fox"])], updater=updater)
        after = editor.backend.features(["a photo of a fox"])
        edit.revert()
        drift[weight] = float((after - editor.backend.features(["a photo of a fox"])).norm())
    assert drift[10.0] < 0.7 * drift[0.0]


def test_training_can_stop_early(editor):
    def steps(**settings):
        updater = configure("text encoder, embedding", steps=40, evaluate_every=2, **settings)
        return updater.train(editor.backend, [request()], locate(editor, updater)).training

    enough = steps(stop_at=0.9)
    assert enough.after <= 0.9 * enough.before and enough.steps < 40
    assert all(loss > 0.9 * enough.before for _, loss in enough.history[:-1])
    away = steps(patience=2, learning_rate=0.1)  # so large that the loss soon rises
    losses = [loss for _, loss in away.history]
    assert away.steps < 40 and losses.index(min(losses)) == len(losses) - 3


def test_a_training_that_diverges_is_an_error_and_the_model_is_whole(editor):
    before = model_state(editor.pipeline)
    updater = configure("text encoder, embedding", learning_rate=1e30)
    with pytest.raises(NonFiniteError, match=r"diverged.*Lower learning_rate"):
        updater.solve(editor.backend, [request()], locate(editor, updater))
    assert model_state(editor.pipeline) == before


def test_requests_that_a_method_cannot_carry_out_are_refused(editor, tokenizer_folder):
    with pytest.raises(RequestError, match="esd erases and cannot give another meaning"):
        editor.update("dog", "cat", updater=configure("esd"))
    with pytest.raises(RequestError, match=r"trains all requests together.*strengths \[0.5, 1.0\]"):
        editor.run([request(), request(subject="pig", strength=0.5)], updater=configure("esd"))
    other = Editor(xl.pipeline(tokenizer_folder))
    for method in ("esd", "text encoder, embedding"):
        with pytest.raises(UnsupportedModelError, match=r"works on Stable Diffusion 1.x and 2.x.*two text encoders"):
            other.ablate("dog", target="cat", updater=configure(method))
    editor.pipeline.unet.register_to_config(time_cond_proj_dim=4)
    with pytest.raises(UnsupportedModelError, match="Its UNet takes a guidance embedding"):
        editor.ablate("dog", target="cat", updater=configure("esd"))


def test_strength_scales_what_was_trained(editor):
    updater = configure("text encoder, embedding", steps=2)
    location = locate(editor, updater)
    whole = updater.solve(editor.backend, [request()], location)
    half = updater.solve(editor.backend, [request(strength=-0.5)], location)
    for site, change in whole:
        assert torch.allclose(half.factors[site].dense(), -0.5 * change.dense(), atol=1e-9)
