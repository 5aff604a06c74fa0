"""Shared fixtures: random-weight Stable Diffusion pipelines built from config, in both families and both layouts."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import build


@pytest.fixture(autouse=True)
def _one_thread():
    """Two workers share two cores: one torch thread each, and the caller's random state left alone."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    return build.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(params=["sd1", "sd2"])
def family(request):
    return request.param


@pytest.fixture(params=["flat", "nested"])
def layout(request):
    return request.param


@pytest.fixture
def pipeline(tokenizer_folder, family, layout):
    """A tiny pipeline of each family in each layout of the text encoder."""
    return build.pipeline(tokenizer_folder, family=family, layout=layout)


@pytest.fixture
def sd1(tokenizer_folder):
    """A tiny SD 1.x pipeline in the installed transformers' own layout."""
    return build.pipeline(tokenizer_folder, family="sd1", layout="flat")
