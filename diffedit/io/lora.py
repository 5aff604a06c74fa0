"""An edit as the adapters that other programs load: kohya's LoRA layout and PEFT's.

A change `up @ down` is a LoRA already: `lora_up` (PEFT: `lora_B`) is `up` [d_out, r], `lora_down` (`lora_A`) is `down`
[r, d_in], and with alpha = r its scale alpha / r is 1. What these writers add is what the readers get wrong:

* diffusers 0.42 mixes up per-module alphas and older ones mixed ranks, silently. So every module of a file is padded
  with zeros to one rank r, and alpha is r.
* half-precision copies of unbalanced factors lose digits or overflow. So both factors carry the root of each singular
  value (`LowRank.compress`).
* transformers 5.6 dropped the level `text_model` from module names. kohya names survive that (diffusers >= 0.41 maps
  them); PEFT matches literally, so its file holds each tensor under the old and the new name. Diffusers would apply
  only half of a file that mixes layouts, hence two files.
* a PEFT folder belongs to one model. The text encoder's is the edit's own folder, those of the UNet and of Stable
  Diffusion XL's second text encoder are `unet/` and `text_encoder_2/` in it; kohya's file holds all components.
* AUTOMATIC1111 ignores an `out_proj` of an OpenCLIP text encoder (Stable Diffusion 2, the second of XL) without
  `q_proj`, `k_proj` and `v_proj` beside it (read from its source). There, zero modules keep it company.
* diffusers' own layout (`diffusers_file`) names a module by component and path. The only text encoder that changed its
  paths, `CLIPTextModel`, is in that file under both, of which each version of the libraries takes its own.

No `lora_adapter_metadata` key: its readers disagree from version to version, and without it they derive the right
values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from diffedit.delta import Delta, LowRank
from diffedit.errors import SwallowedError, UnsupportedTensorError
from diffedit.io.container import pack
from diffedit.io.manifest import Manifest
from diffedit.io.names import flat_path, hub_id, is_xl, kohya_name
from diffedit.site import EditSite

KOHYA_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_FOLDER: Mapping[str, str] = {"text_encoder": "", "text_encoder_2": "text_encoder_2/", "unet": "unet/"}

# Half precision costs 3e-4 (float16) or 3e-3 (bfloat16) of a change; far beyond that its numbers have left the range.
MAX_ROUNDING = 0.02

_SD2, _SECOND = "sd2", "text_encoder_2"
_OUT = "self_attn.out_proj"
_COMPANIONS = ("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj")


def kohya_file(delta: Delta, manifest: Manifest, *, dtype: torch.dtype = torch.float32) -> bytes:
    """Bytes of `pytorch_lora_weights.safetensors`, for diffusers, ComfyUI and AUTOMATIC1111.

    Args:
        delta: the change, in the text encoders, the UNet or all of them.
        manifest: where base and names come from.
        dtype: of the factors; a half precision halves the file and costs what `rounding_error` says. Alpha is float32.

    Raises:
        UnsupportedModelError: an edit of another component.
        NonFiniteError: the delta is not finite, or overflows in `dtype`.
        SwallowedError: more than `MAX_ROUNDING` of the change is lost in `dtype`.
    """
    factors = _adapter_factors(delta, dtype)
    rank, xl = next(iter(factors.values())).rank, is_xl(delta.sites, manifest.base.backend)
    tensors: dict[str, Tensor] = {}
    for site, change in factors.items():
        modules = {kohya_name(site, xl=xl): change}
        if (manifest.base.backend == _SD2 or site.component == _SECOND) and site.path.endswith(_OUT):
            zero = LowRank(torch.zeros_like(change.up), torch.zeros_like(change.down))
            name = kohya_name(site, xl=xl).removesuffix(_kohya(_OUT))
            modules |= {name + _kohya(other): zero for other in _COMPANIONS}
        for name, module in modules.items():
            tensors[f"{name}.lora_up.weight"] = module.up
            tensors[f"{name}.lora_down.weight"] = module.down
            tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    return pack(_kohya_metadata(manifest, rank, xl), tensors)


def diffusers_file(delta: Delta, manifest: Manifest, *, dtype: torch.dtype = torch.float32) -> bytes:
    """Bytes of a LoRA file in diffusers' own layout, for `load_lora_weights` alone.

    Arguments and errors are those of `kohya_file`.
    """
    tensors = {}
    for site, change in _adapter_factors(delta, dtype).items():
        for path in dict.fromkeys((site.path, site.path if site.component == _SECOND else flat_path(site))):
            tensors[f"{site.component}.{path}.lora_A.weight"] = change.down
            tensors[f"{site.component}.{path}.lora_B.weight"] = change.up
    return pack({"diffedit": manifest.edit_id, "format": "pt"}, tensors)


def peft_files(delta: Delta, manifest: Manifest, *, dtype: torch.dtype = torch.float32) -> dict[str, bytes]:
    """`adapter_config.json` and `adapter_model.safetensors` per component, for PEFT and `load_adapter` of transformers.

    Arguments and errors are those of `kohya_file`.

    Returns:
        Relative name -> content; the (first) text encoder's files have no folder, others lie in that of `PEFT_FOLDER`.
    """
    components: dict[str, dict[EditSite, LowRank]] = {}
    for site, change in _adapter_factors(delta, dtype).items():
        components.setdefault(site.component, {})[site] = change
    files = {}
    for component, factors in components.items():
        config, tensors = _peft_component(factors, hub_id(manifest.base.source))
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        files[PEFT_FOLDER[component] + PEFT_CONFIG] = text.encode("ascii")
        metadata = {"diffedit": manifest.edit_id, "format": "pt"}
        files[PEFT_FOLDER[component] + PEFT_FILE] = pack(metadata, tensors)
    return files


def rounding_error(delta: Delta, dtype: torch.dtype) -> float:
    """|exported - delta| / |delta| over all sites, balanced factors stored in `dtype`; 0 for a zero delta."""
    off = total = 0.0
    for change in delta.factors.values():
        rounded = change.compress().to(dtype).to(torch.float64)
        off += (change.to(torch.float64) + rounded.scale(-1.0)).norm() ** 2
        total += change.norm() ** 2
    return math.sqrt(off / total) if total else 0.0


def _peft_component(
    factors: Mapping[EditSite, LowRank], base: str | None
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Configuration and tensors of one component's adapter.

    Target modules are full paths: PEFT matches them as suffixes, so a short one would wrap every layer.
    """
    rank = next(iter(factors.values())).rank
    tensors = {}
    for site, change in factors.items():
        for path in dict.fromkeys((site.path, flat_path(site))):
            tensors[f"base_model.model.{path}.lora_A.weight"] = change.down
            tensors[f"base_model.model.{path}.lora_B.weight"] = change.up
    config: dict[str, object] = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(flat_path(site) for site in factors),
        "task_type": None,
    }
    return config, tensors


def _adapter_factors(delta: Delta, dtype: torch.dtype) -> dict[EditSite, LowRank]:
    """Balanced factors in `dtype` on the CPU, all of one rank, in the sites' order."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise UnsupportedTensorError(
            "adapters hold float16, bfloat16 or float32", value=dtype, hint="leave dtype out for float32"
        )
    if not delta.sites:
        raise UnsupportedTensorError("there is no change to export", hint="apply an edit first")
    balanced: dict[EditSite, LowRank] = {}
    for site, change in delta:
        kohya_name(site)  # refuses a component that adapters cannot hold, before any work is done
        change.check_finite(site.name)
        balanced[site] = change.compress().to(dtype, "cpu")
        balanced[site].check_finite(f"{site.name}, rounded to {dtype},")
    lost = rounding_error(delta, dtype)
    if not lost <= MAX_ROUNDING:
        raise SwallowedError(
            f"{dtype} cannot hold the change", value=f"{lost:.1%} of it is lost", hint="export in float32"
        )
    rank = max(change.rank for change in balanced.values())
    return {site: _pad(change, rank) for site, change in balanced.items()}


def _pad(change: LowRank, rank: int) -> LowRank:
    """The same matrix with zero columns of `up` and zero rows of `down` up to `rank`."""
    up = change.up.new_zeros(change.up.shape[0], rank)
    down = change.down.new_zeros(rank, change.down.shape[1])
    up[:, : change.rank], down[: change.rank] = change.up, change.down
    return LowRank(up, down)


def _kohya(path: str) -> str:
    return path.replace(".", "_")


def _kohya_metadata(manifest: Manifest, rank: int, xl: bool) -> dict[str, str]:
    """Header keys that kohya's scripts and the web UIs read; all text."""
    second = manifest.base.backend == _SD2
    return {
        "diffedit": manifest.edit_id,
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": manifest.slug(),
        "ss_base_model_version": "sdxl_base_v1-0" if xl else "sd_v2" if second else "sd_v1",
        "ss_network_alpha": str(float(rank)),
        "ss_network_dim": str(rank),
        "ss_network_module": "networks.lora",
        "ss_output_name": manifest.slug(),
        "ss_v2": str(second),
    }
