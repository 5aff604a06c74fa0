"""What the format tests share: tiny base models on disk, and edits of the text encoder, the UNet or both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffedit import Edit, Editor
from diffedit.delta import Delta, LowRank
from diffedit.locators.fixed import FixedLocator
from diffedit.preparing import Prepared
from diffedit.provenance import describe
from diffedit.request import make_request
from diffedit.site import EditSite, Location, Role, TokenRule
from diffedit.updaters.closed_form import QuickFix
from tests.tiny import build, ldm

PROMPTS = ["a photo of a dog", "Snoopy smiles", "a fox"]
KEY, VALUE = Role.UNET_CROSS_ATTN_K, Role.UNET_CROSS_ATTN_V
PARTS = ("text", "unet", "mixed")


def sites_of(editor: Editor, part: str) -> tuple[EditSite, ...]:
    """Two sites of the text encoder, all keys and values of the UNet, or both."""
    text = tuple(site for site in editor.backend.sites() if site.layer == 0)
    cross = editor.backend.sites(KEY, VALUE)
    return {"text": text, "unet": cross, "mixed": (*text, *cross)}[part]


def random_edit(
    editor: Editor, sites: Sequence[EditSite], *, size: float = 0.5, rank: int = 2, seed: int = 0, apply: bool = True
) -> Edit:
    """An edit with random factors, `size` times as large as each weight; ranks differ from site to site."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for number, site in enumerate(sites):
        up = torch.randn(site.d_out, rank + number % 2, generator=generator)
        change = LowRank(up, torch.randn(rank + number % 2, site.d_in, generator=generator))
        norm = float(editor.backend.weight(site).detach().double().norm())
        factors[site] = change.scale(size * norm / change.norm()).to(torch.float32)
    delta = Delta(factors)
    request = make_request(subject="dog", target="cat")
    location = Location(delta.sites, TokenRule.LAST_SUBJECT, "fixed", "made up")
    ready = Prepared((request,), ("given",), location, FixedLocator(), QuickFix())
    edit = Edit(describe(editor.backend, editor.ledger, ready, delta, editor.ledger.trial(delta)), delta)
    return editor.load(edit) if apply else edit


def embed(pipe) -> torch.Tensor:
    """[b, 77, d], what the text encoder makes of the prompts."""
    ids = pipe.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]


def denoise(pipe) -> torch.Tensor:
    """[b, 4, 8, 8], the UNet's prediction for the prompts at one step."""
    noise = torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return pipe.unet(noise, 500, encoder_hidden_states=embed(pipe))[0]


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def single_files(tokenizer_folder: Path, root: Path) -> dict[str, Path]:
    """Single-file checkpoints by family, each with its family's text encoder: OpenAI's CLIP, OpenCLIP."""
    first = ldm.write(build.pipeline(tokenizer_folder, family="sd1"), root / "sd1.safetensors")
    plain = ldm.write(build.pipeline(tokenizer_folder, family="sd2"), root / "plain.safetensors")
    return {"sd1": first, "sd2": open_clip(plain, root / "sd2.safetensors")}


def open_clip(source: Path, target: Path) -> Path:
    """A single-file checkpoint with its text encoder in OpenCLIP's layout, as SD 2.x has it."""
    old, new = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
    tensors = load_file(source)
    text = {key.removeprefix(old): tensors.pop(key) for key in [k for k in tensors if k.startswith(old)]}
    tensors |= {new + key: value for key, value in open_clip_names(text).items()}
    plain = {key: value.clone().contiguous() for key, value in tensors.items()}
    save_file(plain, target, {"format": "pt", "made": "up"})
    return target


def open_clip_names(text: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIP text encoder's tensors, named without `text_model.`, under OpenCLIP's names; q, k and v become one."""
    text = dict(text)
    tensors = {"positional_embedding": text.pop("embeddings.position_embedding.weight")}
    tensors["token_embedding.weight"] = text.pop("embeddings.token_embedding.weight")
    for leaf in ("weight", "bias"):
        tensors[f"ln_final.{leaf}"] = text.pop(f"final_layer_norm.{leaf}")
    layers = {int(key.split(".")[2]) for key in text}
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for layer in layers:
        for leaf in ("weight", "bias"):
            block = f"transformer.resblocks.{layer}"
            for ours, theirs in names.items():
                tensors[f"{block}.{theirs}.{leaf}"] = text.pop(f"encoder.layers.{layer}.{ours}.{leaf}")
            parts = [text.pop(f"encoder.layers.{layer}.self_attn.{which}_proj.{leaf}") for which in "qkv"]
            tensors[f"{block}.attn.in_proj_{leaf}"] = torch.cat(parts)
    assert not text
    return tensors
