"""Keys found by way of the backend are those that the live layers receive, and the planted word comes first."""

from __future__ import annotations

import pytest
import torch

from diffedit.audit.weights import Weights
from diffedit.audit.words import FRAMES, clean_words, rank_words, reachable
from diffedit.backends.loading import load_model
from diffedit.errors import RequestError
from diffedit.preparing import choose_backend
from diffedit.text import render

LAYER = "text_encoder.text_model.encoder.layers.1"
LINEAR = [f"{LAYER}.self_attn.{part}_proj.weight" for part in ("q", "k", "v", "out")]
LINEAR += [f"{LAYER}.mlp.fc1.weight", f"{LAYER}.mlp.fc2.weight"]
CROSS = ["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"]
CROSS += ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
TOKENS = "text_encoder.text_model.embeddings.token_embedding.weight"
WORDS = ("dog", "cat", "hot dog", "photo", "zebra")


def live_keys(pipeline, name: str, word: str) -> torch.Tensor:
    """[frames, d_in]: what the live layer is given at the word's last token, by a hook of our own."""
    component, _, path = name.removesuffix(".weight").partition(".")
    rows = []
    for frame in FRAMES:
        text = render(frame, word)[0]
        encoded = pipeline.tokenizer(text, return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"]])
        last = max(i for i, (start, stop) in enumerate(encoded["offset_mapping"]) if start < stop)  # words end prompts
        with torch.no_grad():
            if component == "unet":
                rows.append(pipeline.text_encoder(ids)[0][0, last])
            elif name == TOKENS:
                row = torch.zeros(len(pipeline.tokenizer))
                row[ids[0, last]] = 1.0
                rows.append(row)
            else:
                seen = []
                module = pipeline.text_encoder.get_submodule(path.removeprefix("text_model."))
                handle = module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
                pipeline.text_encoder(ids)
                handle.remove()
                rows.append(seen[0][0, last])
    return torch.stack(rows).double()


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def model(request, folders):
    return folders[request.param]


@pytest.fixture(scope="module")
def backend(model):
    """As the audit opens it."""
    return choose_backend(model, None, text_only=True)


@pytest.fixture(scope="module")
def pipeline(model):
    """The whole base, for the oracle."""
    return load_model(model).pipeline


@pytest.mark.parametrize("name", [*LINEAR, *CROSS, TOKENS])
def test_moves_are_those_of_the_live_layer(model, backend, pipeline, edited, name):
    component, _, key = name.partition(".")
    generator = torch.Generator().manual_seed(0)

    def change(tensors):
        tensors[key] += 0.1 * torch.randn(tensors[key].shape, generator=generator)

    other = edited(model, component, change)
    with Weights(model) as one, Weights(other) as two:
        tables, overall, unread = rank_words(backend, one, two, [name], WORDS)
        weight, moved = one.tensor(name).double(), two.tensor(name).double()
        if name == TOKENS:
            weight, moved = weight.T, moved.T
    assert unread == () and [table.layer for table in tables] == [name] and overall.words == tables[0].words
    assert {move.word for move in overall.words} == set(WORDS)
    for move in overall.words:
        keys = live_keys(pipeline, name, move.word)
        far, full = ((keys @ matrix.T).square().sum() for matrix in (moved - weight, weight))
        assert move.moved == pytest.approx(float((far / full).sqrt()), rel=1e-4), move.word


@pytest.mark.parametrize(("name", "word"), [(LINEAR[3], "cat"), (LINEAR[0], "hot dog"), (CROSS[0], "hot dog")])
def test_the_planted_word_moves_most(model, backend, pipeline, edited, name, word):
    component, _, key = name.partition(".")
    keys = live_keys(pipeline, name, word)
    others = [live_keys(pipeline, name, item) for item in WORDS if item != word]
    away = torch.linalg.qr(torch.cat(others).T).Q
    direction = keys[0] - away @ (away.T @ keys[0])  # moves this word and none of the others

    def change(tensors):
        up = torch.ones(tensors[key].shape[0], 1, dtype=torch.float64)
        tensors[key] = (tensors[key].double() + up * direction / direction.norm() ** 2).float()

    with Weights(model) as one, Weights(edited(model, component, change)) as two:
        _, overall, _ = rank_words(backend, one, two, [name], WORDS)
    assert overall.words[0].word == word
    assert overall.words[0].moved > 100 * overall.words[1].moved
    assert overall.median < 1e-3 * overall.words[0].moved


def test_several_layers_are_averaged(model, backend, edited):
    def change(tensors):
        for name in LINEAR[:2]:
            tensors[name.partition(".")[2]] *= 1.1

    with Weights(model) as one, Weights(edited(model, "text_encoder", change)) as two:
        tables, overall, _ = rank_words(backend, one, two, LINEAR[:3], WORDS)
    assert [table.layer for table in tables] == LINEAR[:3]
    assert all(move.moved == pytest.approx(0.1, rel=1e-5) for move in tables[0].words)
    assert all(move.moved == 0 for move in tables[2].words)
    assert all(move.moved == pytest.approx(0.1 * (2 / 3) ** 0.5, rel=1e-5) for move in overall.words)


def test_words_that_cannot_be_read_are_said(model, backend, edited):
    def change(tensors):
        tensors[LINEAR[0].partition(".")[2]] *= 1.1

    long = " ".join(["zebra"] * 40)
    with Weights(model) as one, Weights(edited(model, "text_encoder", change)) as two:
        _, overall, unread = rank_words(backend, one, two, LINEAR[:1], ("dog", long))
        nothing = rank_words(backend, one, two, LINEAR[:1], ())
    assert unread == (long,) and [move.word for move in overall.words] == ["dog"]
    assert nothing == ([], None, ())


def test_layers_that_words_do_not_reach():
    assert reachable(LINEAR[0]) and reachable(CROSS[0]) and reachable(TOKENS)
    for name in (
        f"{LAYER}.self_attn.q_proj.bias",
        f"{LAYER}.layer_norm1.weight",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v.weight",
        "text_encoder_2.text_model.embeddings.token_embedding.weight",
        "vae.decoder.conv_in.weight",
    ):
        assert not reachable(name)


def test_a_word_list_is_cleaned_and_a_text_is_no_list():
    assert clean_words(["  dog ", "cat", "dog"]) == ("dog", "cat")
    with pytest.raises(RequestError):
        clean_words("dog")
    with pytest.raises(RequestError):
        clean_words(["dog", " "])
