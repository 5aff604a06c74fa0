"""Proves that tokens taken some at a time are those of the whole reading, to the bit, and stay what they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffedit import Editor
from diffedit.backends import first_layer
from diffedit.site import Role
from tests.tiny import build, xl

PHRASES = [
    ("dog", "dog", 0),
    ("a photo of a dog", "dog", 13),
    ("the old Van Gogh house in Nice", "Van Gogh", 8),
    ("a photo of a cat, not of a dog", "cat", 13),
    ("a photo of a cat", "cat", 13),
]


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def backend(request, tokenizer_folder):
    pipe = (
        xl.pipeline(tokenizer_folder)
        if request.param == "sdxl"
        else build.pipeline(tokenizer_folder, family=request.param)
    )
    return Editor(pipe).backend


@pytest.fixture
def places(backend):
    """Prompts share their first tokens, so some of these are one computation."""
    return [(span, position) for span in backend.spans(PHRASES) for position in range(1, span.eos + 1)]


@pytest.mark.parametrize("chunk", [136, 3])
def test_some_tokens_are_rows_of_all_tokens(backend, places, chunk, monkeypatch):
    monkeypatch.setattr(first_layer, "_CHUNK", chunk)
    first, later = backend.sites(Role.TEXT_SELF_ATTN_OUT)[0], backend.sites(Role.TEXT_MLP_OUT)[1]
    cross = backend.sites(Role.UNET_CROSS_ATTN_V)[0]
    chosen = np.array([5, 0, 5, len(places) - 1, 7, 2])
    for sites in ([first], [later], [first, later, cross]):
        rows = backend.read(places, sites)
        for site in sites:
            inputs, streams = rows.take(site, chosen)
            assert rows.inputs[site].shape == (len(places), site.d_in)
            assert torch.equal(inputs, rows.inputs[site][chosen])
            assert torch.equal(streams, rows.streams[site][chosen])


def test_what_was_read_stays_when_the_model_changes(backend, places):
    """The weights of embeddings, norm and projections; attention itself is computed later."""
    (site, *_) = backend.sites(Role.TEXT_SELF_ATTN_OUT)
    assert backend.independent([site])
    before, rows = backend.read(places, [site]), backend.read(places, [site])
    kept = before.inputs[site].clone(), before.streams[site].clone()
    with torch.no_grad():
        for weight in backend.model.pipeline.text_encoder.parameters():
            weight += 0.1
    assert torch.equal(rows.inputs[site], kept[0]) and torch.equal(rows.streams[site], kept[1])
    assert not torch.equal(backend.read(places, [site]).inputs[site], kept[0])
