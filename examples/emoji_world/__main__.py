"""Command line: `build` pictures and tokenizer, `train` the parts, `evaluate` the gate, `export` the folders.

`facts` trains the second text encoder of an exported model, measures it and writes it beside the first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from . import classifier, clip, common, evaluate, export, facts_card, pictures, tokenizer, unet, vae
from .augment import Copies
from .vae import load_vae
from .world import OBJECTS, STYLES, compose

STAGES: dict[str, float] = {"vae": 35, "clip": 40, "scorer": 27, "classifier": 5, "unet": 75}  # minutes on two cores
FACTS_MINUTES = 30.0  # on one core


def train(work: Path, stages: list[str], minutes: float | None, workers: int) -> None:
    """Train the stages in order; each resumes from its checkpoint."""
    for stage in stages:
        limit = minutes or STAGES[stage]
        if stage == "vae":
            common.run_workers(workers, work, vae.train_vae, work, limit)
        elif stage == "clip":
            clip.train_clip("clip", work, limit, seed=2)
        elif stage == "scorer":
            clip.train_clip("scorer", work, limit, seed=11, copies=Copies(work, load_vae(work)))
        elif stage == "classifier":
            classifier.train_classifier(work, limit, Copies(work, load_vae(work)))
        else:
            common.run_workers(workers, work, export.train_unet, work, limit)


def samples(work: Path) -> None:
    """A sheet for the model card: twelve objects in every style."""
    pipe = unet.assemble(work, unet.averaged_unet(work, 128))
    prompts = [compose(name, 1, style, None).text for style in STYLES for name in OBJECTS[2::6]]
    grid = unet.sample(pipe, prompts, [2_000_000 + i for i in range(len(prompts))])
    common.save_grid(grid, work / "samples.png", len(OBJECTS[2::6]))


def main() -> None:
    """Parse the arguments and run one command."""
    parser = argparse.ArgumentParser(prog="python -m examples.emoji_world", description=__doc__)
    parser.add_argument("command", choices=["build", "train", "evaluate", "export", "facts"])
    parser.add_argument("--work", type=Path, default=Path("emoji_world_work"), help="data, checkpoints, plots")
    parser.add_argument("--packages", type=Path, help="build: folder with the unpacked icon packages")
    parser.add_argument("--bpe", type=Path, help="build: bpe_simple_vocab_16e6.txt.gz, or a wheel that contains it")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="train: which parts")
    parser.add_argument("--minutes", type=float, help="train: instead of each part's usual time")
    parser.add_argument("--seeds", type=int, default=3, help="evaluate: pictures for each object in each style")
    parser.add_argument("--model", type=Path, help="evaluate, facts: an exported folder")
    parser.add_argument("--out", type=Path, help="export: folder that receives emoji/ and emoji-scorer/")
    parser.add_argument("--threads", type=int, default=2, help="cores to use (the denoiser: one worker process each)")
    args = parser.parse_args()
    common.set_up(args.threads, seed=0)
    if args.command == "build":
        if args.packages is None or args.bpe is None:
            parser.error("build needs --packages and --bpe")
        pictures.build(args.packages, args.work)
        tokenizer.build_tokenizer(args.bpe, args.work / "tokenizer")
    elif args.command == "train":
        train(args.work, args.stages, args.minutes, args.threads)
    elif args.command == "evaluate":
        if args.model is not None:
            pipe = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
            pipe.set_progress_bar_config(disable=True)
        else:
            pipe = unet.assemble(args.work, unet.averaged_unet(args.work, 128))
        evaluate.evaluate(pipe, args.work, args.seeds)
    elif args.command == "facts":
        facts_card.make(args.model or args.work / "export" / "emoji", args.work, args.minutes or FACTS_MINUTES)
    else:
        out = args.out or args.work / "export"
        gate = json.loads((args.work / "gate.json").read_text()) if (args.work / "gate.json").exists() else None
        samples(args.work)
        export.export_pipeline(args.work, out / "emoji", unet.averaged_unet(args.work, 128), gate)
        export.export_scorer(args.work, out / "emoji-scorer", gate)


if __name__ == "__main__":
    main()
