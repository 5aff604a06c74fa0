"""A tiny pipeline whose UNet listens to the text, and small trainings of every method on it."""

from __future__ import annotations

import pytest
import torch

from diffedit import Editor, registry
from diffedit.request import make_request
from tests.tiny import build

SMALL = {"steps": 6, "evaluations": 1, "evaluate_every": 2, "learning_rate": 5e-5}
# id -> (registered name, settings)
METHODS = {
    "esd": ("esd", {"sampling_steps": 3, "negative_guidance": 3.0, "batch_size": 2}),
    "esd, paper's trajectory": ("esd", {"sampling_steps": 3, "negative_guidance": 3.0, "trajectory": "trained"}),
    "esd-u": ("esd-u", {"sampling_steps": 3, "negative_guidance": 3.0, "batch_size": 2, "learning_rate": 2e-4}),
    "concept ablation": ("concept-ablation", {"sampling_steps": 3, "anchors": 3, "batch_size": 2}),
    "text encoder, embedding": ("finetune-text-encoder", {"batch_size": 4, "learning_rate": 3e-4}),
    "text encoder, noise": ("finetune-text-encoder", {"loss": "noise", "sampling_steps": 3, "anchors": 3}),
}


# What a few steps leave of each loss, at most. Random weights give ESD little to steer away from.
LEFT = dict(zip(METHODS, (0.98, 0.98, 0.98, 0.6, 0.9, 0.5), strict=True))


def configure(method: str, **settings):
    """A small training of one of `METHODS`."""
    name, own = METHODS[method]
    return registry.configure("updaters", name, {**SMALL, **own, **settings})


def locate(editor: Editor, updater):
    """Where the updater trains by default."""
    return registry.build("locators", updater.locator).locate(editor.backend, [])


def request(**fields):
    return make_request(**{"subject": "dog", "target": "cat", "templates": ("a photo of a {}", "the {}"), **fields})


def listening(tokenizer_folder, family: str = "sd1", layout: str = "flat"):
    """Random weights hardly let the text through to the picture; eightfold cross-attention does."""
    pipeline = build.pipeline(tokenizer_folder, family=family, layout=layout)
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if ".attn2.to_out." in name or ".attn2.to_v." in name:
                parameter.mul_(8)
    return pipeline


@pytest.fixture
def editor(tokenizer_folder):
    return Editor(listening(tokenizer_folder))
