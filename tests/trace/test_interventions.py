"""Proves that restored runs are what they claim to be, in text encoder and UNet, and leave nothing behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffedit.errors import RequestError, UnsupportedModelError
from diffedit.intervention import Part, Patch, Runs, find_parts
from diffedit.locators.noise import subject_noise
from diffedit.testing import unchanged

PROMPT = "a photo of a dog in the sun"


@pytest.fixture
def text(backend):
    span = backend.span(PROMPT, "dog")
    width, std = backend.embedding_scale()
    return span, subject_noise(span, width, 3 * std, seed=1)


def everything(backend, component="text_encoder"):
    return backend.parts(component)


def positions(backend):
    return tuple(range(backend.length))


def naive(backend, noise, start, patch):
    """The restored states by the plainest means: one clean pass that stores, one corrupted pass that replaces."""
    root = backend._root(backend._encoder)
    tokens = backend.tokenize([PROMPT], padded=True)
    modules = {("embedding", 0): root.embeddings}
    for i, layer in enumerate(root.encoder.layers):
        modules |= {("self_attn", i): layer.self_attn, ("mlp", i): layer.mlp}
    stored, handles = {}, []

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    for key, module in modules.items():
        handles.append(module.register_forward_hook(lambda m, a, o, key=key: stored.__setitem__(key, first(o).clone())))
    with torch.no_grad():
        backend._encoder(input_ids=tokens)
    for handle in handles:
        handle.remove()
    wanted = {(part.kind, part.layer) for part in patch.parts}

    def replace(key):
        def hook(module, args, out):
            changed = first(out).clone()
            if key == ("embedding", 0):
                changed[:, start : start + len(noise)] += noise
            if key in wanted:
                where = list(patch.positions)
                changed[:, where] = stored[key][:, where]
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        return hook

    handles = [module.register_forward_hook(replace(key)) for key, module in modules.items()]
    with torch.no_grad():
        out = backend._encoder(input_ids=tokens).last_hidden_state[0]
    for handle in handles:
        handle.remove()
    return out


def test_the_clean_run_is_the_pipelines_own(backend, text):
    span, noise = text
    runs = backend.encode_runs(PROMPT, noise, span.start, [])
    expected = backend.model.pipeline.encode_prompt(PROMPT, torch.device("cpu"), 1, False)[0][0]
    torch.testing.assert_close(runs.states[0], expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(runs.states[0], backend.embed([PROMPT])[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(runs.pooled[0], backend.features([PROMPT])[0], rtol=0, atol=2e-6)


def test_corruption_reaches_the_subject_and_what_follows_only(backend, text):
    span, noise = text
    clean, corrupted = backend.encode_runs(PROMPT, noise, span.start, []).states
    assert torch.equal(clean[: span.start], corrupted[: span.start])
    assert (clean[span.start :] != corrupted[span.start :]).any(1).all()


def test_restoring_everything_gives_the_clean_run_exactly(backend, text):
    span, noise = text
    patch = Patch(everything(backend), positions(backend))
    runs = backend.encode_runs(PROMPT, noise, span.start, [patch])
    assert torch.equal(runs.states[2], runs.states[0])
    assert torch.equal(runs.pooled[2], runs.pooled[0])


def test_restoring_nothing_gives_the_corrupted_run_exactly(backend, text):
    span, noise = text
    before = Patch(find_parts(everything(backend), ("self_attn", "mlp")), tuple(range(span.start)))
    runs = backend.encode_runs(PROMPT, noise, span.start, [Patch((), ()), before])
    assert torch.equal(runs.states[2], runs.states[1])
    assert torch.equal(runs.states[3], runs.states[1])  # the noise never reaches the positions before the subject


def test_every_single_state_agrees_with_the_plain_loop(backend, text):
    span, noise = text
    parts = everything(backend)
    patches = [Patch((part,), where) for part in parts for where in ((span.last,), (span.eos,), positions(backend))]
    patches += [Patch(parts[1:4], (span.last,))]
    patches = patches[::-1]  # not in the order in which their rows join
    runs = backend.encode_runs(PROMPT, noise, span.start, patches, max_rows=9)
    for patch, states in zip(patches, runs.states[2:], strict=True):
        expected = naive(backend, noise, span.start, patch)
        torch.testing.assert_close(states, expected, rtol=0, atol=5e-6)
    distances = (runs.states[2:] - runs.states[1]).flatten(1).norm(dim=1)
    assert (distances > 0).sum() == len(patches) - 1  # the embedding of the end-of-text token was never corrupted


def test_chunks_change_nothing(backend, text):
    span, noise = text
    patches = [Patch((part,), (span.last,)) for part in everything(backend)]
    whole = backend.encode_runs(PROMPT, noise, span.start, patches).states
    torch.testing.assert_close(backend.encode_runs(PROMPT, noise, span.start, patches, max_rows=3).states, whole)


def test_parts_are_listed_in_running_order_with_their_sites(backend):
    text = everything(backend)
    assert [part.name for part in text[:4]] == ["embedding-0", "self_attn-0", "mlp-0", "self_attn-1"]
    assert {part.sites[0] for part in text[1:]} == set(backend.sites())
    assert all(part.sites[0].path.startswith(part.path) and part.layer == part.sites[0].layer for part in text[1:])
    unet = everything(backend, "unet")
    modules, ran = dict(backend.model.pipeline.unet.named_modules()), []
    handles = [modules[p.path].register_forward_pre_hook(lambda m, a, p=p: ran.append(p.path)) for p in unet]
    latent = torch.zeros(1, 4, 8, 8)
    with torch.no_grad():
        backend.model.pipeline.unet(latent, 0, encoder_hidden_states=backend.embed(["a dog"]))
    for handle in handles:
        handle.remove()
    assert ran == [part.path for part in unet]
    cross = find_parts(unet, ("cross_attn",))
    assert [part.layer for part in cross] == list(range(len(cross)))
    assert all(site.path.startswith(part.path) for part in cross for site in part.sites)
    assert all(len(part.sites) == 2 for part in cross)


def test_a_full_size_unet_has_the_papers_seventy_parts():
    from diffusers import UNet2DConditionModel

    from diffedit.backends.unet_runs import unet_parts

    with torch.device("meta"):
        parts = unet_parts(UNet2DConditionModel(cross_attention_dim=768))
    kinds = [part.kind for part in parts]
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert counts == {"resnet": 22, "self_attn": 16, "cross_attn": 16, "feed_forward": 16}
    assert parts[kinds.index("resnet")].path == "down_blocks.0.resnets.0"
    assert [part.path for part in parts if part.kind == "cross_attn"][6].startswith("mid_block")


def unet_runs(backend, text, parts, **fields):
    span, noise = text
    states = backend.encode_runs(PROMPT, noise, span.start, []).states
    rows = torch.cat([states, states[1:2].expand(len(parts), -1, -1)])
    return Runs(PROMPT, 5, rows, ((), (), *parts), **fields)


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("both", [False, True])
def test_restoring_every_unet_part_draws_the_clean_picture_and_none_the_corrupted(backend, text, both):
    runs = unet_runs(backend, text, [everything(backend, "unet"), ()], both_branches=both)
    seen = pixels(backend.sample(runs, steps=3, guidance=3.0, batch_size=4))
    assert np.array_equal(seen[2], seen[0])
    assert np.array_equal(seen[3], seen[1])
    predicted = backend.predict(runs, (0.9, 0.5), batch_size=4)
    assert predicted.shape == (4, 2, 4, 8, 8)
    torch.testing.assert_close(predicted[2], predicted[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(predicted[3], predicted[1], rtol=0, atol=1e-6)
    assert (predicted[0] - predicted[1]).abs().max() > 1e-4


def test_the_clean_picture_is_the_one_that_generate_draws(backend, text):
    runs = unet_runs(backend, text, [])
    seen = pixels(backend.sample(runs, steps=2, guidance=3.0, batch_size=2))
    plain = pixels(backend.generate([(PROMPT, 5)], steps=2, guidance=3.0, batch_size=1))
    assert np.abs(seen[0].astype(int) - plain[0].astype(int)).max() <= 1


def test_batches_change_no_restored_run(backend, text):
    parts = [(part,) for part in everything(backend, "unet")]
    runs = unet_runs(backend, text, parts)
    whole = backend.predict(runs, (0.9,), batch_size=64)
    for size in (1, 2, 3, 5):
        torch.testing.assert_close(backend.predict(runs, (0.9,), batch_size=size), whole, rtol=0, atol=1e-5)
    assert len({tuple(row.flatten()[:8].tolist()) for row in whole}) > len(parts) // 2


def test_feeding_every_cross_attention_is_the_other_prompt(backend):
    states = backend.embed(["a cat", PROMPT])
    cross = find_parts(everything(backend, "unet"), ("cross_attn",))
    runs = Runs("a cat", 1, states[[0, 1, 1, 1]], ((), (), cross, cross[:1]), take="embedding")
    seen = backend.predict(runs, (0.9,), batch_size=8)
    torch.testing.assert_close(seen[2], seen[0], rtol=0, atol=1e-6)
    assert (seen[3] - seen[0]).abs().max() > 1e-6 and (seen[3] - seen[1]).abs().max() > 1e-6


def test_pictures_drawn_while_reading_another_text(backend):
    states = backend.embed(["a cat", PROMPT])
    cross = find_parts(everything(backend, "unet"), ("cross_attn",))
    runs = Runs("a cat", 1, states[[0, 1, 1]], ((), (), cross), take="embedding")
    seen = pixels(backend.sample(runs, steps=3, guidance=3.0, batch_size=8))
    assert np.array_equal(seen[2], seen[0])
    assert not np.array_equal(seen[1], seen[0])


def test_the_text_is_read_once_and_the_layers_are_left_as_they_were(backend, text):
    unet = backend.model.pipeline.unet
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2.to_k")]
    storage = [(parameter.data_ptr(), parameter.stride()) for parameter in unet.parameters()]
    first, stock, calls = layers[0], layers[0].forward, []

    def offloading(*args):  # what accelerate puts in a layer's place
        calls.append(args)
        return stock(*args)

    first.forward = offloading
    try:
        backend.sample(unet_runs(backend, text, []), steps=3, guidance=3.0, batch_size=4)
        assert len(calls) == 1
        assert vars(first)["forward"] is offloading
        assert not any("forward" in vars(layer) for layer in layers[1:])
        assert [(parameter.data_ptr(), parameter.stride()) for parameter in unet.parameters()] == storage
    finally:
        del first.forward


class Stop(BaseException):
    """Stands for Ctrl-C: not an `Exception`."""


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, Stop])
def test_weights_hooks_and_modes_are_as_before_whatever_happens(backend, text, error):
    span, noise = text
    pipeline = backend.model.pipeline
    pipeline.unet.train()
    runs = unet_runs(backend, text, [(part,) for part in everything(backend, "unet")])
    patches = [Patch((part,), (span.last,)) for part in everything(backend)]
    work = (
        (pipeline.text_encoder, lambda: backend.encode_runs(PROMPT, noise, span.start, patches)),
        (pipeline.unet, lambda: backend.predict(runs, (0.9,), batch_size=4)),
        (pipeline.unet, lambda: backend.sample(runs, steps=2, guidance=2.0, batch_size=4)),
        (pipeline.vae, lambda: backend.batch_limit()),
    )
    for module, run in work:
        leaf = [child for child in module.modules() if not list(child.children())][-1]

        def fail(*_):
            raise error("stop")

        handle = leaf.register_forward_hook(fail) if error else None
        with unchanged(pipeline, "an intervention"):
            if error:
                with pytest.raises(error):
                    run()
            else:
                run()
        assert not any("forward" in vars(child) for child in module.modules())
        if handle:
            handle.remove()


def test_what_does_not_exist_is_refused(backend, text):
    span, noise = text
    with pytest.raises(UnsupportedModelError, match=r"no such component.*vae"):
        backend.parts("vae")
    for part in (Part("text_encoder", 0, "self_attn", 99, "x"), Part("unet", 0, "resnet", 0, "x")):
        with pytest.raises(UnsupportedModelError, match="no such part"):
            backend.encode_runs(PROMPT, noise, span.start, [Patch((part,), (1,))])
        with pytest.raises(UnsupportedModelError, match="only be patched at a part"):
            backend.predict(unet_runs(backend, text, [(part,)]), (0.9,), batch_size=4)
    resnet = find_parts(everything(backend, "unet"), ("resnet",))[:1]
    with pytest.raises(UnsupportedModelError, match="only be patched at a cross-attention"):
        backend.predict(unet_runs(backend, text, [resnet], take="embedding"), (0.9,), batch_size=4)
    for steps in ((), (1.0,), (-0.1,)):
        with pytest.raises(RequestError, match="shares of the schedule"):
            backend.predict(unet_runs(backend, text, []), steps, batch_size=4)


def test_the_digest_sees_one_changed_weight(backend):
    before = backend.digest()
    assert backend.digest() == before
    next(backend.model.pipeline.unet.parameters()).data.view(-1)[0] += 1e-3
    assert backend.digest() != before


def test_less_memory_means_smaller_batches(backend):
    assert backend.batch_limit(memory=1) == 1
    assert 1 < backend.batch_limit(memory=2_000_000) < backend.batch_limit(memory=8_000_000)
