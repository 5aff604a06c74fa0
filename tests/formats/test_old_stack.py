"""The same files in the libraries of the time before transformers 5.6 dropped the level `text_model`.

A virtual environment with transformers 4.57, diffusers 0.35 and PEFT 0.17 (torch and the rest come from the running
one) loads a merged folder, the kohya file and the PEFT folders, of edits of the text encoder, the UNet and both, and
must compute what the libraries here compute. Then diffedit itself runs there on the real nested `CLIPTextModel`: it
applies the saved edits, reverts them, and makes an edit whose numbers are those of the one made here. diffedit does not
promise to work with these versions (see pyproject.toml); this shows that its layout bridge is real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from safetensors.torch import save_file

from diffedit import Editor
from tests.formats.made import PARTS, PROMPTS, denoise, embed, random_edit, sites_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
OLD = {"transformers": "4.57.3", "diffusers": "0.35.2", "peft": "0.17.1", "huggingface_hub": "0.36.0"}
WITH = ["tokenizers>=0.22,<=0.23.0", "requests", "urllib3", "charset_normalizer", "idna"]
TOLERANCE = 1e-5

LOADER = """
import json, sys
import diffusers, peft, torch, transformers
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file

prompts, out = json.loads(sys.argv[1]), {}
versions = {m.__name__: m.__version__ for m in (transformers, diffusers, peft)}

def embed(pipe):
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]

def denoise(pipe):
    noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return pipe.unet(noise, 500, encoder_hidden_states=embed(pipe))[0]

for case in json.loads(sys.argv[2]):
    wanted = load_file(case["edit"] + ".safetensors")
    gaps = {}

    def measure(way, pipe):
        found = {"embeddings": embed(pipe), "prediction": denoise(pipe)}
        gaps[way] = {what: float((found[what] - wanted[what]).abs().max()) for what in found}

    def fresh(folder=case["base"]):
        return StableDiffusionPipeline.from_pretrained(folder)

    pipe = fresh()
    assert "text_model.encoder.layers.0.self_attn.out_proj" in dict(pipe.text_encoder.named_modules())
    measure("before", pipe)
    pipe.load_lora_weights(case["edit"], weight_name="pytorch_lora_weights.safetensors")
    measure("kohya", pipe)
    pipe = fresh()
    for part in case["parts"]:
        folder = {} if part == "text_encoder" else {"subfolder": part}
        setattr(pipe, part, PeftModel.from_pretrained(getattr(pipe, part), case["edit"], **folder))
    measure("peft", pipe)
    pipe = fresh(case["merged"])
    measure("merged", pipe)
    pipe.set_progress_bar_config(disable=True)
    pipe("a dog", num_inference_steps=1, height=16, width=16, output_type="latent", clip_skip=1)
    out[case["edit"]] = gaps
assert not any(name.split(".")[0] == "diffedit" for name in sys.modules)
print("RESULT " + json.dumps({"versions": versions, "gaps": out}))
"""

EDITOR = """
import json, sys
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizerFast
sys.path.insert(0, sys.argv[1])
from diffedit import Editor

prompts, out = json.loads(sys.argv[2]), {}

def embed(pipe):
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]

for case in json.loads(sys.argv[3]):
    # Their pipelines come with a tokenizer written in Python, which tells no character offsets.
    pipe = StableDiffusionPipeline.from_pretrained(case["base"])
    pipe.tokenizer = CLIPTokenizerFast.from_pretrained(case["base"] + "/tokenizer")
    editor = Editor(pipe)
    plain = embed(editor.pipeline)
    edit = editor.load(case["edit"])
    off = float((embed(editor.pipeline) - load_file(case["edit"] + ".safetensors")["embeddings"]).abs().max())
    again = StableDiffusionPipeline.from_pretrained(editor.save_pipeline(case["edit"] + "-merged-old"))
    same = torch.equal(embed(again), embed(editor.pipeline))
    edit.revert()
    made = editor.ablate("dog", target="cat")
    (site,) = made.delta.sites
    made.export(case["edit"] + "-made-old")
    dense = made.delta.factors[site].dense().tolist()
    made.revert()
    reverted = torch.equal(embed(editor.pipeline), plain)
    out[case["edit"]] = {"off": off, "same": same, "reverted": reverted, "site": site.path, "dense": dense}
print("RESULT " + json.dumps(out))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of the old environment; skips where it cannot be made."""
    folder = tmp_path_factory.mktemp("old-stack") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pins = [f"{name}=={version}" for name, version in OLD.items()]
    run = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", *pins, *WITH],
        capture_output=True,
        text=True,
        timeout=900,
    )
    if run.returncode:
        pytest.skip(f"the old libraries cannot be installed here: {run.stderr.strip().splitlines()[-1:]}")
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}  # after the old ones: torch and the rest
    Path(site.stdout.strip(), "here.pth").write_text("\n".join(sorted(paths)) + "\n", encoding="utf-8")
    return python


@pytest.fixture(scope="module")
def cases(bases, tmp_path_factory):
    root, plan = tmp_path_factory.mktemp("new-stack"), {}
    for family, base in bases.items():
        for part in PARTS:
            editor = Editor(base)
            edit = random_edit(editor, sites_of(editor, part))
            folder = edit.save(root / f"{family}-{part}")
            merged = editor.save_pipeline(root / f"{family}-{part}-merged")
            wanted = {"embeddings": embed(editor.pipeline), "prediction": denoise(editor.pipeline)}
            save_file({key: value.contiguous() for key, value in wanted.items()}, f"{folder}.safetensors")
            parts = sorted({site.component for site in edit.delta.sites})
            plan[family, part] = {"base": str(base), "edit": str(folder), "merged": str(merged), "parts": parts}
    return plan


def run(python: Path, script: str, *args: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python), "-c", script, *args], capture_output=True, text=True, env=environment, timeout=600
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, done.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


def test_old_libraries_load_what_we_write(python, cases):
    result = run(python, LOADER, json.dumps(PROMPTS), json.dumps(list(cases.values())))
    assert result["versions"] == {name: OLD[name] for name in ("transformers", "diffusers", "peft")}
    for (_, part), case in cases.items():
        gaps = result["gaps"][case["edit"]]
        before = gaps.pop("before")
        assert before["prediction"] > 1e-2 and (before["embeddings"] > 1e-2) == (part != "unet")  # controls
        assert set(gaps) == {"kohya", "peft", "merged"}
        assert {way: gap for way, gap in gaps.items() if max(gap.values()) > TOLERANCE} == {}, case["edit"]


def test_diffedit_itself_works_on_the_real_nested_layout(python, cases):
    result = run(python, EDITOR, str(ROOT), json.dumps(PROMPTS), json.dumps(list(cases.values())))
    for case in cases.values():
        found = result[case["edit"]]
        assert found["off"] <= TOLERANCE and found["same"] and found["reverted"]
        made = Editor(case["base"]).ablate("dog", target="cat")
        (site,) = made.delta.sites
        dense = made.delta.factors[site].dense()
        assert found["site"] == site.path
        other = dense.new_tensor(found["dense"])
        assert float((other - dense).norm()) <= 1e-4 * float(dense.norm())
        merged = Editor(f"{case['edit']}-merged-old").pipeline
        assert float((embed(merged) - embed(Editor(case["merged"]).pipeline)).abs().max()) <= TOLERANCE
