"""Stable Diffusion pipelines from config with random weights: real architecture, no download, no meaning.

`layout="nested"` gives the text encoder the module names that transformers had before 5.6 (`text_model.encoder...`), by
wrapping the installed class: the only change between the two layouts is that one level.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffedit.updaters.closed_form import QuickFix

TRUE_SIZE = {
    "sd1": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    "sd2": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16),
}
VOCABULARY = 49408
TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
MERGES = ("a n", "d o", "do g</w>", "c a", "ca t</w>", "a</w> p", "p i", "o f</w>", "t h", "i n", "e r", "p h", "ph o")


def plain(**fields) -> QuickFix:
    """The paper's objective: only the subject is paired, only the size of the change is charged, lam as it is."""
    return QuickFix(everyday=0, give_up=None, **fields)


class NestedTextModel(torch.nn.Module):
    """The module layout of CLIPTextModel before transformers 5.6."""

    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        self.text_model = model
        self.config = model.config

    def forward(self, *args, **kwargs):
        return self.text_model(*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        return self.text_model.dtype

    @property
    def device(self) -> torch.device:
        return self.text_model.device


def write_tokenizer(folder: Path) -> Path:
    """CLIP's byte-level BPE with a handful of merges; the full byte alphabet, so any text has tokens."""
    import json

    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in keep] + [chr(256 + i) for i in range(256 - len(keep))]
    tokens = alphabet + [c + "</w>" for c in alphabet]
    merges = [m for m in MERGES if "</w> " not in m]
    tokens += [m.replace(" ", "") for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "unk_token": "<|endoftext|>"}
    config |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def text_encoder(vocab_size: int, family: str, *, true_size: bool = False, seed: int = 0) -> CLIPTextModel:
    """A random CLIP text encoder of a family."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        **(TRUE_SIZE[family] if true_size else TINY),
        vocab_size=VOCABULARY if true_size else vocab_size,
        max_position_embeddings=77,
        hidden_act={"sd1": "quick_gelu", "sd2": "gelu"}[family],
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id={"sd1": vocab_size - 1, "sd2": 0}[family],
    )
    model = CLIPTextModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.05)
            elif "embedding" in name:
                parameter.normal_(0, 0.3)
    return model


def autoencoder() -> AutoencoderKL:
    """A tiny VAE of random weights."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    ).eval()


def pipeline(
    tokenizer_folder: Path, *, family: str = "sd1", layout: str = "flat", true_size: bool = False, seed: int = 0
) -> StableDiffusionPipeline:
    """A pipeline whose UNet and VAE are tiny; the text encoder is tiny or of true size."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    if family == "sd2":
        tokenizer.pad_token = "!"
    if true_size:
        tokenizer.model_max_length = 77
    encoder = text_encoder(len(tokenizer), family, true_size=true_size, seed=seed)
    torch.manual_seed(seed + 1)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=encoder.config.hidden_size,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        use_linear_projection=family == "sd2",
    ).eval()
    vae = autoencoder()
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
        prediction_type="v_prediction" if family == "sd2" else "epsilon",
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if layout == "nested":
        pipe.text_encoder = NestedTextModel(encoder)
    return pipe


def fake_pipeline(**attributes) -> SimpleNamespace:
    """Something that looks like a pipeline from afar."""
    return SimpleNamespace(components={}, **attributes)
