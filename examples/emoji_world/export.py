"""Write the trained parts as published folders, half precision: a `StableDiffusionPipeline` and a `CLIPModel`.

The text encoder is saved with the nested key names (`text_model.encoder...`) that every published Stable Diffusion
folder has, and the tokenizer with `vocab.json` and `merges.txt`, so that transformers 4 and 5 both read them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel

from . import unet
from .card import model_card, scorer_card
from .clip import MEAN, STD
from .common import log, replace_file
from .world import PIXELS, vocabulary


def publish(new: Path, final: Path) -> None:
    """Put a finished folder in the place of an older one, readable by everyone."""
    for file in new.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    shutil.rmtree(old, ignore_errors=True)


def fresh(final: Path) -> Path:
    """An empty folder beside the final one."""
    new = final.with_name(final.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    return new


def write_json(path: Path, value: object) -> None:
    """Readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def clean_config(path: Path, **changes: object) -> None:
    """Drop machine paths from a saved configuration and set some values."""
    config = json.loads(path.read_text())
    for key in ("_name_or_path", "name_or_path"):
        config.pop(key, None)
    write_json(path, {**config, **changes})


def copy_tokenizer(work: Path, folder: Path) -> None:
    """All tokenizer files, old and new format."""
    folder.mkdir(exist_ok=True)
    for file in sorted((work / "tokenizer").iterdir()):
        shutil.copy(file, folder / file.name)


def nested_half(encoder: CLIPTextModel) -> dict[str, torch.Tensor]:
    """A text encoder's weights in half precision under nested key names."""
    state = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in encoder.state_dict().items()}
    return {k: v.half().contiguous() for k, v in state.items() if not k.endswith("position_ids")}


def save_text_encoder(encoder: CLIPTextModel, folder: Path) -> None:
    """Half precision with nested key names."""
    encoder.save_pretrained(folder)
    save_file(nested_half(encoder), folder / "model.safetensors", metadata={"format": "pt"})


def publish_variant(encoder: CLIPTextModel, file: Path) -> None:
    """Another text encoder for the same pipeline: one file, which diffusers loads as a variant."""
    replace_file(file, lambda part: save_file(nested_half(encoder), part, metadata={"format": "pt"}))


def export_pipeline(work: Path, out: Path, denoiser: UNet2DConditionModel, gate: dict[str, Any] | None = None) -> None:
    """The generator as a `StableDiffusionPipeline` folder with its vocabulary and model card."""
    new = fresh(out)
    pipe = unet.assemble(work, denoiser)
    pipe.vae.to(torch.float16).save_pretrained(new / "vae")
    denoiser.to(torch.float16).save_pretrained(new / "unet")
    pipe.scheduler.save_pretrained(new / "scheduler")
    save_text_encoder(pipe.text_encoder, new / "text_encoder")
    copy_tokenizer(work, new / "tokenizer")
    pipe.save_config(new)
    for config in new.glob("*/config.json"):
        clean_config(config)
    clean_config(new / "model_index.json")
    clean_config(
        new / "text_encoder" / "config.json", dtype="float32"
    )  # transformers 5 would otherwise load half precision
    write_json(new / "vocabulary.json", vocabulary())
    (new / "README.md").write_text(model_card(gate), "utf-8")
    if (work / "samples.png").exists():
        shutil.copy(work / "samples.png", new / "samples.png")
    publish(new, out)


def export_scorer(work: Path, out: Path, gate: dict[str, Any] | None = None) -> None:
    """The scorer as a `CLIPModel` folder with tokenizer and preprocessing files."""
    new = fresh(out)
    scorer = CLIPModel.from_pretrained(work / "scorer", dtype=torch.float32)
    scorer.save_pretrained(new)
    weights = {k: v.half().contiguous() for k, v in load_file(new / "model.safetensors").items()}
    save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
    clean_config(new / "config.json", dtype="float32")
    copy_tokenizer(work, new)
    write_json(
        new / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": PIXELS},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": PIXELS, "width": PIXELS},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(MEAN),
            "image_std": list(STD),
        },
    )
    (new / "README.md").write_text(scorer_card(gate), "utf-8")
    publish(new, out)


def snapshot(work: Path, step: int) -> None:
    """Export the denoiser as it is now, so that others can work with it while it trains."""
    export_pipeline(work, work / "export_latest", unet.averaged_unet(work, 128))
    log.info("exported step %d", step)


def train_unet(work: Path, minutes: float) -> None:
    """One worker of the denoiser's training, with exports on the way."""
    unet.train_unet(work, minutes, on_report=lambda step: snapshot(work, step))
