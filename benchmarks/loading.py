"""What `Editor(path)` reads: time and peak memory of one edit at Stable Diffusion 1.4 size, against reading everything.

The model is Stable Diffusion 1.4 by its published configuration with random weights, saved once in float16: a pipeline
folder and, for the single-file way, the same tensors in one checkpoint of the original layout (its names are those
of the original code, its VAE's layers are left in place). Every measurement is a process of its own, since the peak of
a process cannot be taken back: it imports everything, notes its size, opens the model, makes one edit and notes the
peak. Lazy and eager take turns, `--runs` times; the medians and their ratio are reported.

    python -m benchmarks.loading --out docs/results

Needs 5 GB of disk in a temporary folder, which is removed, and for the eager runs 5 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffedit.io.folder import write_file

UNET = {"cross_attention_dim": 768, "attention_head_dim": 8}  # the rest is diffusers' default, which is SD 1.x
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "sample_size": 512,
}


def build(folder: Path) -> None:
    """Write the model as a folder and as one file."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from tests.tiny import ldm
    from tests.tiny.build import TRUE_SIZE, write_tokenizer

    (folder / "tokenizer-files").mkdir()
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(folder / "tokenizer-files"))
    config = CLIPTextConfig(
        **TRUE_SIZE["sd1"],
        vocab_size=49408,
        hidden_act="quick_gelu",
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )
    with torch.device("meta"):
        unet, vae, encoder = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE), CLIPTextModel(config)
    for number, module in enumerate((encoder, unet, vae)):
        module.half().to_empty(device="cpu")
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.uniform_(-0.05, 0.05, generator=generator)
            for name, buffer in module.named_buffers():
                if name.endswith("position_ids"):
                    buffer.copy_(torch.arange(buffer.numel()).reshape(buffer.shape))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "model")
    ldm.write(pipeline, folder / "model.safetensors")


def measure(kind: str, way: str, folder: Path) -> dict[str, float]:
    """One edit in this process: seconds, and bytes of the peak above what the imports took."""
    from diffedit import Editor
    from diffedit.backends.deferred import unread

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.linalg.qr(torch.eye(8, dtype=torch.float64))  # loads LAPACK
    from diffusers import StableDiffusionPipeline  # noqa: F401

    source = folder / ("model" if kind == "folder" else "model.safetensors")
    before, start = status("VmRSS"), time.perf_counter()
    editor = Editor(source, config=None if kind == "folder" else str(folder / "model"))
    if way == "eager":
        assert editor.pipeline.unet is not None
    opened = time.perf_counter() - start
    editor.ablate("dog", target="cat", preserve=[])
    took = time.perf_counter() - start
    assert (unread(editor.backend.model.pipeline) is not None) == (way == "lazy")
    memory = status("VmHWM") - before
    parameters = sum(p.numel() for p in editor.backend.model.pipeline.text_encoder.parameters())
    return {"seconds": took, "opening_seconds": opened, "peak_bytes": memory, "text_parameters": parameters}


def status(field: str) -> int:
    """A size of this process in bytes, as Linux counts it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"this system does not tell {field}")


def run(kind: str, way: str, folder: Path, threads: int) -> dict[str, float]:
    """`measure` in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--measure", kind, way, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        kind, way, folder = args.measure
        sys.stdout.write(json.dumps(measure(kind, way, Path(folder))) + "\n")
        return
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "torch": torch.__version__,
    }
    results: dict[str, Any] = {"machine": machine, "runs": args.runs, "load": [os.getloadavg()[0]]}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        build(folder)
        results["disk_bytes"] = {
            part: sum(path.stat().st_size for path in (folder / "model" / part).iterdir())
            for part in ("text_encoder", "unet", "vae")
        }
        found: dict[str, dict[str, list[dict[str, float]]]] = {}
        for kind in ("folder", "file"):
            found[kind] = {"lazy": [], "eager": []}
            for number in range(args.runs + 1):
                for way in ("lazy", "eager"):
                    measured = run(kind, way, folder, args.threads)
                    if number:  # the first round warms the disk's cache
                        found[kind][way].append(measured)
    for kind, ways in found.items():
        medians = {
            way: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for way, runs in ways.items()
        }
        ratios = {key: medians["eager"][key] / medians["lazy"][key] for key in ("seconds", "peak_bytes")}
        results[kind] = {**medians, "eager / lazy": ratios}
    results["load"].append(os.getloadavg()[0])
    write_file(args.out / "loading.json", (json.dumps(results, indent=2) + "\n").encode(), overwrite=True)
    sys.stdout.write(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
