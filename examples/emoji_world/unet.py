"""The denoiser: a stock diffusers `UNet2DConditionModel` on cached latents and cached text embeddings.

Everything that does not change is computed once: each (object, style, background) is drawn with several jitters and
encoded, and a caption is embedded the first time it is drawn. A step then costs only the denoiser. Noise prediction,
min-SNR weights, 10% empty captions.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from .clip import named, text_encoder_of, tokens
from .common import load_checkpoint, log, rank, save_grid, train, workers
from .pictures import JITTER, Pictures
from .tokenizer import load_tokenizer
from .vae import encode
from .world import BACKGROUNDS, GUIDANCE, MAX_TOKENS, OBJECTS, STEPS, STYLES, compose, random_caption

CHANNELS = (64, 192)
SNR_CAP = 5.0


def make_unet(width: int, channels: tuple[int, ...] = CHANNELS) -> UNet2DConditionModel:
    """The untrained denoiser."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=width,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def cached_latents(work: Path, vae: AutoencoderKL, copies: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled latents of every combination, `copies` jitters each, and their labels; each worker keeps its own file."""
    path = work / f"latents-{rank()}.safetensors"
    if path.exists():
        saved = load_file(path)
        return saved["latents"], saved["labels"]
    source, rng = Pictures.load(work), Random(seed + rank())
    labels = [
        (o, s, b)
        for o in range(len(OBJECTS))
        for s in range(len(STYLES))
        for b in range(len(BACKGROUNDS))
        for _ in range(copies)
    ]
    parts = []
    for start in tqdm(range(0, len(labels), 60), desc="latents", mininterval=10):
        drawn = [
            source.draw(*label, rng.randint(-JITTER, JITTER), rng.randint(-JITTER, JITTER))
            for label in labels[start : start + 60]
        ]
        parts.append(encode(vae, torch.stack(drawn)))
    latents = (torch.cat(parts) * vae.config.scaling_factor).contiguous()
    save_file({"latents": latents, "labels": torch.tensor(labels)}, path)
    return latents, torch.tensor(labels)


class TextCache:
    """Embeds a caption the first time it is asked for (half precision in memory)."""

    def __init__(self, encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        self.encoder, self.tokenizer = encoder, tokenizer
        self.rows: dict[str, int] = {}
        self.table = torch.zeros(0, MAX_TOKENS, encoder.config.hidden_size, dtype=torch.float16)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self.rows]
        if new:
            if len(self.rows) + len(new) > len(self.table):
                self.table = torch.cat([self.table, self.table.new_zeros(8192, *self.table.shape[1:])])
            states = self.encoder(tokens(self.tokenizer, new)).last_hidden_state
            for text, state in zip(new, states, strict=True):
                self.table[len(self.rows)] = state
                self.rows[text] = len(self.rows)
        return self.table[[self.rows[text] for text in texts]].float()


def load_parts(work: Path) -> tuple[CLIPTokenizer, CLIPTextModel, AutoencoderKL]:
    """The frozen parts trained before."""
    clip = CLIPModel.from_pretrained(work / "clip")
    return load_tokenizer(work / "tokenizer"), text_encoder_of(clip), AutoencoderKL.from_pretrained(work / "vae").eval()


def assemble(work: Path, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """A pipeline in memory."""
    tokenizer, encoder, vae = load_parts(work)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(
    pipe: StableDiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch: int = 66,
) -> torch.Tensor:
    """Pictures in [-1, 1], one seed per prompt."""
    parts = []
    for start in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        output = pipe(
            prompts[start : start + batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
        )
        parts.append(output.images.float() * 2 - 1)
    return torch.cat(parts)


def averaged_unet(work: Path, width: int) -> UNet2DConditionModel:
    """The denoiser with the averaged weights of the last checkpoint."""
    saved = load_checkpoint(work / "unet.pt")
    if saved is None:
        raise FileNotFoundError(f"{work}/unet.pt: train the denoiser first")
    unet = make_unet(width)
    unet.load_state_dict({**saved["model"], **saved["averaged"]})
    return unet.eval()


def train_unet(
    work: Path,
    minutes: float,
    seed: int = 4,
    batch: int = 64,
    copies: int = 2,
    rate: float = 1e-3,
    on_report: Callable[[int], None] | None = None,
) -> UNet2DConditionModel:
    """Train for a number of minutes (resumable) and write `<work>/unet`. Several workers share the batch."""
    tokenizer, encoder, vae = load_parts(work)
    latents, labels = cached_latents(work, vae, copies, seed)
    facts = named([tuple(row) for row in labels.tolist()])
    cache = TextCache(encoder, tokenizer)
    torch.manual_seed(seed)
    unet = make_unet(encoder.config.hidden_size)
    batch //= workers()
    log.info("unet: %.2fM parameters, %d latents", sum(p.numel() for p in unet.parameters()) / 1e6, len(latents))
    alphas = make_scheduler().alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=SNR_CAP) / snr
    saved = load_checkpoint(work / "unet.pt")
    begin = seed + rank() + 1000 * (saved["step"] if saved else 0)  # fresh pictures and noise after a restart
    rng, _ = Random(begin), torch.manual_seed(begin)

    def loss_of(step: int) -> torch.Tensor:
        rows = [rng.randrange(len(facts)) for _ in range(batch)]
        clean = latents[rows]
        embedded = cache([random_caption(rng, *facts[row]).text for row in rows])
        times = torch.randint(0, len(alphas), (batch,))
        noise = torch.randn_like(clean)
        level = alphas[times][:, None, None, None]
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        error = (unet(noisy, times, embedded).sample - noise).square().mean((1, 2, 3))
        return (error * weights[times]).mean()

    def report(step: int) -> None:
        pipe = assemble(work, averaged_unet(work, encoder.config.hidden_size))
        styles = list(STYLES)
        prompts = [compose(name, 1, styles[i // 2 % len(styles)], None).text for i, name in enumerate(OBJECTS)][::2]
        save_grid(
            sample(pipe, prompts, [step + i for i in range(len(prompts))], 15), work / f"unet-grid-{step:06d}.png", 11
        )
        shutil.copy(work / f"unet-grid-{step:06d}.png", work / "unet-grid.png")
        if on_report:
            on_report(step)

    train(
        "unet",
        work,
        unet,
        loss_of,
        steps=200_000,
        minutes=minutes,
        rate=rate,
        warmup=200,
        average=0.995,
        report=report,
        report_every=500,
    )
    if not rank():
        unet.save_pretrained(work / "unet")
    return unet
