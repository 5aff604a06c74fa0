"""The adapter files of Stable Diffusion XL edits, loaded by a process that knows only diffusers and PEFT.

The states that cross-attention reads from both text encoders, the pooled vector and the UNet's prediction are those of
the edited model to 1e-5, by every way of loading.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffedit import Editor
from diffedit.backends.saving import save_pipeline
from diffedit.site import Role
from tests.formats.made import KEY, PROMPTS, VALUE, random_edit
from tests.tiny import xl

TOLERANCE = 1e-5
PARTS = ("text", "second", "mixed")

MEASURE = """
def states(pipe):
    found = {}
    for part, tokenizer in (("text_encoder", pipe.tokenizer), ("text_encoder_2", pipe.tokenizer_2)):
        ids = tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            out = getattr(pipe, part)(ids, output_hidden_states=True)
        found[part] = out.hidden_states[-2]
    found["pooled"] = out[0]
    noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    added = {"text_embeds": out[0], "time_ids": torch.tensor([[16.0, 16.0, 0, 0, 16.0, 16.0]] * len(prompts))}
    both = torch.cat([found["text_encoder"], found["text_encoder_2"]], -1)
    with torch.no_grad():
        found["prediction"] = pipe.unet(noise, 500, encoder_hidden_states=both, added_cond_kwargs=added)[0]
    return found
"""

LOADER = (
    """
import json, sys
import torch
from diffusers import StableDiffusionXLPipeline
from peft import PeftModel
from safetensors.torch import load_file

base, edits, prompts, out = *json.loads(sys.argv[1]), {}
"""
    + MEASURE
    + """
for edit, alone, parts in edits:
    wanted = load_file(edit + ".safetensors")
    gaps = out[edit] = {}

    def measure(way, pipe):
        found = states(pipe)
        gaps[way] = {what: float((found[what] - wanted[what]).abs().max()) for what in found}

    def fresh():
        return StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)

    pipe = fresh()
    unedited = states(pipe)
    measure("before", pipe)
    pipe.load_lora_weights(edit)
    measure("kohya", pipe)
    pipe.unload_lora_weights()
    gaps["unloaded exactly"] = all(torch.equal(value, unedited[what]) for what, value in states(pipe).items())
    pipe.load_lora_weights(alone)
    measure("diffusers", pipe)
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
assert not any(name.split(".")[0] == "diffedit" for name in sys.modules)
print("RESULT " + json.dumps(out))
"""
)
STATES = {"torch": torch, "prompts": PROMPTS}
exec(MEASURE, STATES)


def sites_of(editor, part):
    text = [site for site in editor.backend.sites() if site.layer <= 1]
    second = [site for site in text if site.component == "text_encoder_2"]
    return {"text": text, "second": second, "mixed": [*text, *editor.backend.sites(KEY, VALUE)]}[part]


@pytest.fixture(scope="module")
def edits(tokenizer_folder, tmp_path_factory):
    """Base folder, and per part the edit's folder, a file in diffusers' layout, and the edit."""
    root, made = tmp_path_factory.mktemp("xl"), {}
    base = save_pipeline(xl.pipeline(tokenizer_folder), root / "base")
    for number, part in enumerate(PARTS):
        editor = Editor(base)
        edit = random_edit(editor, sites_of(editor, part), seed=number)
        folder = edit.save(root / part)
        alone = edit.export(root / f"{part}-diffusers.safetensors", layout="diffusers").path
        save_file(
            {key: value.contiguous() for key, value in STATES["states"](editor.pipeline).items()},
            f"{folder}.safetensors",
        )
        made[part] = (folder, alone, edit)
    return base, made


@pytest.fixture(scope="module")
def measured(edits):
    """One process for all, since importing diffusers takes longer than all the rest."""
    base, made = edits
    given = [
        (str(folder), str(alone), sorted({site.component for site in edit.delta.sites}))
        for folder, alone, edit in made.values()
    ]
    script = base.parent / "loader.py"
    script.write_text(LOADER, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, str(script), json.dumps([str(base), given, PROMPTS])],
        capture_output=True,
        text=True,
        cwd=base.parent,
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT "))
    found = json.loads(line.removeprefix("RESULT "))
    return {part: found[str(folder)] for part, (folder, _, _) in made.items()}


@pytest.mark.parametrize("part", PARTS)
def test_stock_loaders_give_the_edited_model(measured, edits, part):
    ways = measured[part]
    touched = {site.component for site in edits[1][part][2].delta.sites}
    moved = {what for what, gap in ways["before"].items() if gap > 1e-2}
    wanted = {"text_encoder_2", "pooled", "prediction"} | ({"text_encoder"} if "text_encoder" in touched else set())
    assert moved == wanted
    assert ways.pop("unloaded exactly") is True
    for way in ("kohya", "diffusers", "fused", "peft", "peft merged"):
        assert max(ways[way].values()) < TOLERANCE, f"{way}: {ways[way]}"


def test_kohya_names_the_encoders_apart_and_keeps_out_proj_company(edits):
    tensors = load_file(edits[1]["text"][0] / "pytorch_lora_weights.safetensors")
    modules = {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
    assert {name.split("_")[1] for name in modules} == {"te1", "te2"}
    stem = "text_model_encoder_layers_0_self_attn"
    companions = {f"lora_te2_{stem}_{letter}_proj" for letter in "qkv"}
    assert companions <= modules and not {f"lora_te1_{stem}_{letter}_proj" for letter in "qkv"} & modules
    assert not any(tensors[f"{name}.lora_up.weight"].any() for name in companions)
    assert len({tensors[f"{name}.lora_down.weight"].shape[0] for name in modules}) == 1
    assert {float(tensors[f"{name}.alpha"]) for name in modules} == {3.0}


def test_an_edit_of_the_first_encoder_alone_still_says_which_one_it_is(edits, tmp_path):
    editor = Editor(edits[0])
    sites = [site for site in editor.backend.sites(Role.TEXT_MLP_OUT) if site.component == "text_encoder"]
    edit = random_edit(editor, sites[:1])
    file = edit.export(tmp_path / "lora.safetensors").path
    assert {key.split("_text_model")[0] for key in load_file(file)} == {"lora_te1"}
    card = edit.files()["README.md"].decode("utf-8")
    assert (
        "no keys for the UNet and the second text encoder" in card and "only the first text encoder is edited" in card
    )


def test_the_card_and_the_folder_name_both_encoders(edits):
    folder, _, edit = edits[1]["mixed"]
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {
        "adapter_model.safetensors",
        "text_encoder_2/adapter_model.safetensors",
        "unet/adapter_model.safetensors",
    } <= names
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "- stable-diffusion-xl\n" in card
    for part, where in (("text_encoder", ""), ("text_encoder_2", ', subfolder="text_encoder_2"')):
        assert f'pipe.{part} = PeftModel.from_pretrained(pipe.{part}, "{edit.manifest.slug()}"{where})' in card
