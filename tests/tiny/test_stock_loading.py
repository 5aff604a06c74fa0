"""Proves that a saved edit works without diffedit: a process that imports only diffusers and PEFT loads the folder and
gets the edited model's text embeddings to 1e-5, for SD 1.x and 2.x, by both of the files meant for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from diffedit import Editor
from tests.tiny import build

PROMPTS = ["a photo of a dog", "Snoopy smiles", "a fox"]

LOADER = """
import json, sys
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel

prompts, out = json.loads(sys.argv[1]), {}
for base, edit in json.loads(sys.argv[2]):
    def embed(pipe):
        ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            return pipe.text_encoder(ids)[0]

    wanted = torch.tensor(json.load(open(edit + ".json")))
    pipe = StableDiffusionPipeline.from_pretrained(base)
    gaps = {"before": float((embed(pipe) - wanted).abs().max())}
    pipe.load_lora_weights(edit)
    gaps["diffusers"] = float((embed(pipe) - wanted).abs().max())
    pipe.unload_lora_weights()
    gaps["after unloading"] = float((embed(pipe) - wanted).abs().max())
    pipe.load_lora_weights(edit, weight_name="pytorch_lora_weights.safetensors")
    pipe.fuse_lora()
    gaps["fused"] = float((embed(pipe) - wanted).abs().max())
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.text_encoder = PeftModel.from_pretrained(pipe.text_encoder, edit)
    gaps["peft"] = float((embed(pipe) - wanted).abs().max())
    pipe.text_encoder = pipe.text_encoder.merge_and_unload()
    gaps["peft merged"] = float((embed(pipe) - wanted).abs().max())
    out[edit] = gaps
assert not any(name.split(".")[0] == "diffedit" for name in sys.modules)
print("RESULT " + json.dumps(out))
"""


def embed(pipe) -> torch.Tensor:
    ids = pipe.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]


@pytest.fixture(scope="module")
def measured(tokenizer_folder, tmp_path_factory):
    """One process for both families, since importing diffusers takes longer than all the rest."""
    root, pairs = tmp_path_factory.mktemp("stock"), {}
    for family in ("sd1", "sd2"):
        pipe = build.pipeline(tokenizer_folder, family=family)
        pipe.save_pretrained(root / f"{family}-base")
        edit = Editor(pipe).ablate(["dog", "Snoopy"], target="cat")
        folder = edit.save(root / f"{family}-edit")
        (root / f"{family}-edit.json").write_text(json.dumps(embed(pipe).tolist()), encoding="utf-8")
        pairs[family] = (str(root / f"{family}-base"), str(folder))
    script = root / "loader.py"
    script.write_text(LOADER, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, str(script), json.dumps(PROMPTS), json.dumps(list(pairs.values()))],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert run.returncode == 0 and lines, run.stderr[-3000:]
    result = json.loads(lines[-1].removeprefix("RESULT "))
    return {family: result[folder] for family, (_, folder) in pairs.items()}


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("way", ["diffusers", "fused", "peft", "peft merged"])
def test_stock_loaders_give_the_edited_embeddings(measured, family, way):
    assert measured[family]["before"] > 1e-2 and measured[family]["after unloading"] > 1e-2  # controls
    assert measured[family][way] <= 1e-5
