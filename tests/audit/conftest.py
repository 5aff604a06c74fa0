"""Tiny models on disk: folders of both families, the same as single files, and edited copies of either."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffedit.backends.saving import save_pipeline
from tests.formats.made import single_files
from tests.saved_model import VOCABULARY
from tests.tiny import build

OUT = "text_model.encoder.layers.0.self_attn.out_proj.weight"
FILES = {"text_encoder": "model.safetensors", "unet": "diffusion_pytorch_model.safetensors"}
FILES["vae"] = FILES["unet"]


@pytest.fixture(scope="session")
def folders(tokenizer_folder, tmp_path_factory) -> dict[str, Path]:
    """Pipelines by family, the text encoder under nested names, with a vocabulary."""
    root = tmp_path_factory.mktemp("folders")
    for family in ("sd1", "sd2"):
        save_pipeline(build.pipeline(tokenizer_folder, family=family), root / family)
        (root / family / "vocabulary.json").write_text(json.dumps(VOCABULARY), encoding="utf-8")
    return {family: root / family for family in ("sd1", "sd2")}


@pytest.fixture(scope="session")
def files(tokenizer_folder, tmp_path_factory) -> dict[str, Path]:
    """The same models as single files: OpenAI's CLIP in the first, OpenCLIP in the second."""
    return single_files(tokenizer_folder, tmp_path_factory.mktemp("files"))


@pytest.fixture
def base(folders) -> Path:
    return folders["sd1"]


Change = Callable[[dict[str, torch.Tensor]], None]


def rewrite(file: Path, change: Change) -> None:
    """Change the tensors of a safetensors file in place."""
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


@pytest.fixture
def edited(tmp_path) -> Callable[..., Path]:
    """`edited(folder, component, change)`: a copy of a folder in which a component's tensors were changed."""

    def make(folder: Path, component: str = "text_encoder", change: Change = lambda tensors: None) -> Path:
        copy = tmp_path / "edited"
        if not copy.exists():
            shutil.copytree(folder, copy)
        rewrite(copy / component / FILES[component], change)
        return copy

    return make


def low_rank(weight: torch.Tensor, rank: int, size: float, seed: int = 0) -> torch.Tensor:
    """A random change of that rank and of `size` times the weight's norm, float64."""
    generator = torch.Generator().manual_seed(seed)
    matrix = weight.reshape(weight.shape[0], -1)
    up = torch.linalg.qr(torch.randn(matrix.shape[0], rank, generator=generator, dtype=torch.float64)).Q
    down = torch.linalg.qr(torch.randn(matrix.shape[1], rank, generator=generator, dtype=torch.float64)).Q
    change = (up * torch.linspace(1.0, 0.5, rank, dtype=torch.float64)) @ down.T
    return (change * (size * float(weight.double().norm()) / float(change.norm()))).reshape(weight.shape)
