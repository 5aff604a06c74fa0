"""Stable Diffusion XL pipelines from config with random weights: two text encoders, a UNet with `text_time` embeddings.

As in `build`, `layout="nested"` gives the first text encoder the module names that transformers had before 5.6; the
second (`CLIPTextModelWithProjection`) is nested in every version.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.formats.made import open_clip_names
from tests.tiny import ldm
from tests.tiny.build import VOCABULARY, NestedTextModel, autoencoder

TRUE_SIZE = (
    dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768),
    dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280),
)
TINY = (
    dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, projection_dim=32),
    dict(hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, projection_dim=24),
)


def text_encoders(tokens: int, *, true_size: bool = False, seed: int = 0):
    """Both text encoders; embeddings and biases are large enough to matter, as in trained ones.

    Args:
        tokens: of the tokenizer, the last two being begin and end of text; the true size has rows for 49,408.
    """
    torch.manual_seed(seed)
    encoders = []
    for second, sizes in enumerate(TRUE_SIZE if true_size else TINY):
        config = CLIPTextConfig(
            **sizes,
            vocab_size=VOCABULARY if true_size else tokens,
            max_position_embeddings=77,
            hidden_act="gelu" if second else "quick_gelu",
            bos_token_id=tokens - 2,
            eos_token_id=tokens - 1,
            pad_token_id=0 if second else tokens - 1,
        )
        model = (CLIPTextModelWithProjection if second else CLIPTextModel)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.05)
                elif "embedding" in name:
                    parameter.normal_(0, 0.3)
        encoders.append(model)
    return encoders


def pipeline(
    tokenizer_folder: Path, *, layout: str = "flat", true_size: bool = False, parts: bool = True, seed: int = 0
) -> StableDiffusionXLPipeline:
    """A pipeline with a tiny UNet and VAE (none with `parts=False`); the text encoders are tiny or of true size."""
    tokenizers = [CLIPTokenizer.from_pretrained(tokenizer_folder) for _ in range(2)]
    tokenizers[1].pad_token = "!"
    encoders = text_encoders(len(tokenizers[0]), true_size=true_size, seed=seed)
    torch.manual_seed(seed + 1)
    unet = vae = None
    if parts:
        width = sum(encoder.config.hidden_size for encoder in encoders)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=(2, 4),
            cross_attention_dim=width,
            transformer_layers_per_block=(1, 2),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=encoders[1].config.projection_dim + 6 * 8,
        ).eval()
        vae = autoencoder()
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )
    if layout == "nested":
        pipe.text_encoder = NestedTextModel(encoders[0])
    return pipe


def embed(pipe, prompts):
    """[b, 77, d1 + d2] and [b, p], as the pipeline's own `encode_prompt` gives them to the UNet."""
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    return states, pooled


def single_file(pipe, path: Path) -> Path:
    """The pipeline as one original-layout checkpoint; the second text encoder has OpenCLIP names there."""
    tensors = {}
    unet = pipe.unet.config
    for key, value in pipe.unet.state_dict().items():
        old = key.replace("add_embedding.linear_1", "label_emb.0.0").replace("add_embedding.linear_2", "label_emb.0.2")
        if old == key:
            old = ldm._unet(key, unet.layers_per_block, unet.up_block_types)
        tensors["model.diffusion_model." + old] = value
    for key, value in pipe.vae.state_dict().items():
        name = ldm._vae(key, len(pipe.vae.config.block_out_channels))
        square = ".attn_1." in name and value.ndim == 2
        tensors["first_stage_model." + name] = value[:, :, None, None] if square else value
    for key, value in pipe.text_encoder.state_dict().items():
        tensors["conditioner.embedders.0.transformer.text_model." + key.removeprefix("text_model.")] = value
    second = {key.removeprefix("text_model."): value for key, value in pipe.text_encoder_2.state_dict().items()}
    projection = second.pop("text_projection.weight")
    tensors |= {f"conditioner.embedders.1.model.{key}": value for key, value in open_clip_names(second).items()}
    tensors["conditioner.embedders.1.model.text_projection"] = projection.T
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path)
    return path
