"""The adapter files of edits of the text encoder, the UNet and both, loaded by a process that knows only diffusers and
PEFT: text embeddings and the UNet's prediction are those of the edited model to 1e-5, by every way of loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import save_file

from diffedit import Editor
from tests.formats.made import PARTS, PROMPTS, denoise, embed, random_edit, sites_of

TOLERANCE = 1e-5

LOADER = """
import json, sys
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file

prompts, out = json.loads(sys.argv[1]), {}

def embed(pipe):
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]

def denoise(pipe):
    noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return pipe.unet(noise, 500, encoder_hidden_states=embed(pipe))[0]

for base, edit, parts in json.loads(sys.argv[2]):
    wanted = load_file(edit + ".safetensors")
    gaps = {}

    def measure(way, pipe):
        found = {"embeddings": embed(pipe), "prediction": denoise(pipe)}
        gaps[way] = {what: float((found[what] - wanted[what]).abs().max()) for what in found}

    def fresh():
        return StableDiffusionPipeline.from_pretrained(base)

    pipe = fresh()
    measure("before", pipe)
    pipe.load_lora_weights(edit)
    measure("diffusers", pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(edit + "-diffusers.safetensors")
    measure("diffusers layout", pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(edit)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    measure("fused", pipe)
    pipe = fresh()
    for part in parts:
        folder = {} if part == "text_encoder" else {"subfolder": part}
        setattr(pipe, part, PeftModel.from_pretrained(getattr(pipe, part), edit, **folder))
    measure("peft", pipe)
    for part in parts:
        setattr(pipe, part, getattr(pipe, part).merge_and_unload())
    measure("peft merged", pipe)
    if "unet" in parts:
        pipe = fresh()
        pipe.unet.load_lora_adapter(
            edit + "/unet", weight_name="adapter_model.safetensors", prefix="base_model.model"
        )
        if "text_encoder" in parts:
            pipe.text_encoder.load_adapter(edit)
        measure("load_lora_adapter", pipe)
    out[edit] = gaps
assert not any(name.split(".")[0] == "diffedit" for name in sys.modules)
print("RESULT " + json.dumps(out))
"""


@pytest.fixture(scope="module")
def measured(bases, tmp_path_factory):
    """One process for all, since importing diffusers takes longer than all the rest."""
    root, plan = tmp_path_factory.mktemp("stock"), {}
    for family, base in bases.items():
        for part in PARTS:
            editor = Editor(base)
            edit = random_edit(editor, sites_of(editor, part))
            folder = edit.save(root / f"{family}-{part}")
            edit.export(f"{folder}-diffusers.safetensors", layout="diffusers")
            wanted = {"embeddings": embed(editor.pipeline), "prediction": denoise(editor.pipeline)}
            save_file({key: value.contiguous() for key, value in wanted.items()}, f"{folder}.safetensors")
            components = sorted({site.component for site in edit.delta.sites})
            plan[family, part] = (str(base), str(folder), components)
    (root / "loader.py").write_text(LOADER, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "loader.py", json.dumps(PROMPTS), json.dumps(list(plan.values()))],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert run.returncode == 0 and lines, run.stderr[-3000:]
    result = json.loads(lines[-1].removeprefix("RESULT "))
    return {which: result[folder] for which, (_, folder, _) in plan.items()}


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("part", PARTS)
def test_every_way_of_loading_gives_the_edited_model(measured, family, part):
    gaps = measured[family, part]
    before = gaps.pop("before")
    assert before["prediction"] > 1e-2 and (before["embeddings"] > 1e-2) == (part != "unet")  # controls
    assert set(gaps) == {"diffusers", "diffusers layout", "fused", "peft", "peft merged"} | (
        {"load_lora_adapter"} if part != "text" else set()
    )
    assert {way: gap for way, gap in gaps.items() if max(gap.values()) > TOLERANCE} == {}
