"""Edits of `uce`, `time` and `locoedit` as adapter files: a process that knows only diffusers loads them and predicts
what the edited model predicts, to 1e-5."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from safetensors.torch import save_file

from diffedit import Editor
from diffedit.locators.cross_attention import CrossAttentionLocator
from tests.formats.made import PROMPTS, denoise, gap

LOADER = """
import json, sys
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

prompts, out = json.loads(sys.argv[1]), {}

def denoise(pipe):
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return pipe.unet(noise, 500, encoder_hidden_states=pipe.text_encoder(ids)[0])[0]

for base, folder in json.loads(sys.argv[2]):
    wanted = load_file(folder + ".safetensors")["prediction"]
    pipe = StableDiffusionPipeline.from_pretrained(base)
    before = float((denoise(pipe) - wanted).abs().max())
    pipe.load_lora_weights(folder)
    out[folder] = [before, float((denoise(pipe) - wanted).abs().max())]
assert not any(name.split(".")[0] == "diffedit" for name in sys.modules)
print("RESULT " + json.dumps(out))
"""


def test_stock_diffusers_predicts_what_the_edited_model_predicts(bases, tmp_path):
    plan = []
    for family, updater in (("sd1", "uce"), ("sd2", "time"), ("sd1", "locoedit")):
        editor = Editor(bases[family])
        plain = denoise(editor.pipeline)
        window = CrossAttentionLocator(first=1, last=2) if updater == "locoedit" else None
        edit = editor.ablate("dog", target="cat", updater=updater, locator=window)
        folder = edit.save(tmp_path / f"{family}-{updater}")
        wanted = denoise(editor.pipeline)
        assert gap(plain, wanted) > 1e-3  # control: the edit shows
        save_file({"prediction": wanted.contiguous()}, f"{folder}.safetensors")
        plan.append((str(bases[family]), str(folder)))
    (tmp_path / "loader.py").write_text(LOADER, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "loader.py", json.dumps(PROMPTS), json.dumps(plan)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert run.returncode == 0 and lines, run.stderr[-3000:]
    found = json.loads(lines[-1].removeprefix("RESULT "))
    assert len(found) == 3
    assert all(before > 1e-3 and after <= 1e-5 for before, after in found.values()), found
