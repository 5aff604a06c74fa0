"""Backends over tiny random pipelines, and a measure that plants a causal site in one of them."""

from __future__ import annotations

import pytest
import torch

from diffedit import registry
from diffedit.backends.loading import load_model
from diffedit.interfaces import Sampling
from tests.tiny import build


def small(pipeline):
    """The backend of a tiny pipeline with a short way of sampling."""
    loaded = load_model(pipeline)
    object.__setattr__(loaded, "sampling", Sampling(steps=2, guidance=3.0, pixels=16))
    (cls,) = [cls for cls in registry.backends() if cls.accepts(pipeline)]
    return cls(loaded)


@pytest.fixture
def backend(pipeline):
    return small(pipeline)


@pytest.fixture
def plain(sd1):
    return small(sd1)


@pytest.fixture
def planted(tokenizer_folder):
    """An encoder in which only layer 1's self-attention carries anything from one token to the next.

    The other attention outputs and every MLP are silenced, so what the end of the prompt knows of the subject went
    through layer 1.
    """
    pipeline = build.pipeline(tokenizer_folder)
    with torch.no_grad():
        for number, layer in enumerate(pipeline.text_encoder.encoder.layers):
            layer.mlp.fc2.weight.zero_()
            layer.mlp.fc2.bias.zero_()
            if number != 1:
                layer.self_attn.out_proj.weight.zero_()
                layer.self_attn.out_proj.bias.zero_()
    return small(pipeline)
