"""Whether an adapter file holds the same change as the edit beside it, found out by multiplying its factors.

    change = scale * lora_up @ lora_down,     scale = alpha / r (kohya), lora_alpha / r (PEFT)

The products are compared, not the bytes: whoever loads the adapter gets the product. Sources: the two layouts as
`io.lora` writes them. Limits: convolutions, DoRA and the like are no part of an edit, so they count as foreign.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffedit.audit.tensors import TensorFile
from diffedit.delta import Delta, LowRank
from diffedit.errors import IntegrityError
from diffedit.io.names import flat_path, is_xl, kohya_name
from diffedit.site import EditSite

# Largest |product - delta| / |delta| that storing the factors in this dtype explains, with room for another BLAS.
TOLERANCE = {"F32": 1e-6, "F16": 2e-3, "BF16": 2e-2, "F64": 1e-6}

_UP, _DOWN, _ALPHA = ".lora_up.weight", ".lora_down.weight", ".alpha"
_PEFT = "base_model.model."
_INFORMATION = {"base_model_name_or_path", "peft_version"}


def kohya_difference(path: Path, delta: Delta, backend: str) -> tuple[float, str]:
    """How far a kohya file is from the delta: the largest |product - delta| / |delta| of a site, and the dtype.

    Args:
        path: the file.
        delta: the edit's whole change.
        backend: name of the edit's backend, which decides how kohya names the text encoder.

    Raises:
        IntegrityError: the file holds another change: modules are missing, foreign or of another shape, or too far off.
        ArtifactError: it cannot be read.
    """
    with TensorFile(path) as file:
        xl = is_xl(delta.sites, backend)
        known = {kohya_name(site, xl=xl): site for site in delta.sites}
        modules = {name.removesuffix(_UP) for name in file.entries if name.endswith(_UP)}
        parts = {module + part for module in modules for part in (_UP, _DOWN, _ALPHA)}
        _same(set(file.entries), parts, "tensors")
        found = {}
        for module in sorted(modules):
            up, down, alpha = (file.tensor(module + part) for part in (_UP, _DOWN, _ALPHA))
            change = _factors(module, up, down, float(alpha.double().reshape(-1)[0]))
            if module in known:
                found[known[module]] = change
            elif change.norm() != 0:
                raise IntegrityError("the adapter changes a layer that the edit does not", value=ascii(module)[:120])
        return _compare(delta, found), _dtype(file)


def peft_difference(
    path: Path, delta: Delta, component: str, config: Mapping[str, Any], expected: Mapping[str, Any]
) -> tuple[float, str]:
    """The same for a PEFT file of one component.

    Args:
        path: `adapter_model.safetensors`.
        delta: the edit's whole change.
        component: whose part of it.
        config: the `adapter_config.json` beside it.
        expected: the one that the edit would write.

    Raises:
        IntegrityError: see `kohya_difference`; or the configuration means something else.
    """
    _check_config(config, expected)
    sites = [site for site in delta.sites if site.component == component]
    with TensorFile(path) as file:
        names = {
            f"{_PEFT}{where}.lora_{side}.weight"
            for site in sites
            for where in (site.path, flat_path(site))
            for side in "AB"
        }
        _same(set(file.entries), names, "tensors")
        worst = 0.0
        for layout in (lambda site: site.path, flat_path):
            found = {}
            for site in sites:
                stem = f"{_PEFT}{layout(site)}.lora_"
                up, down = file.tensor(f"{stem}B.weight"), file.tensor(f"{stem}A.weight")
                found[site] = _factors(site.name, up, down, float(config["lora_alpha"]), int(config["r"]))
            worst = max(worst, _compare(Delta({site: delta.factors[site] for site in sites}), found))
        return worst, _dtype(file)


def _factors(name: str, up: Tensor, down: Tensor, alpha: float, rank: int | None = None) -> LowRank:
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0] or not up.shape[1]:
        shapes = f"{tuple(up.shape)} and {tuple(down.shape)}"
        raise IntegrityError(f"the factors of {ascii(name)[:120]} do not multiply", value=shapes)
    change = LowRank(up.double(), down.double()).scale(alpha / (up.shape[1] if rank is None else rank))
    change.check_finite(ascii(name)[:120])
    return change


def _compare(delta: Delta, found: Mapping[EditSite, LowRank]) -> float:
    """The largest relative difference, over all of the delta's sites."""
    worst = 0.0
    for site, change in delta:
        if site not in found or found[site].shape != change.shape:
            shape = "nothing" if site not in found else f"{found[site].shape}"
            raise IntegrityError(f"the adapter has no change of {site.name}", value=f"{shape}, not {change.shape}")
        off = (found[site] + LowRank(change.up.double(), change.down.double()).scale(-1.0)).norm()
        norm = change.norm()
        worst = max(worst, off / norm if norm else off)
    return worst


def _check_config(config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    odd = [
        key
        for key in sorted(config.keys() | expected.keys())
        if key not in _INFORMATION and (config.get(key) != expected[key] if key in expected else bool(config[key]))
    ]
    if odd:
        raise IntegrityError(
            "adapter_config.json means something else than the edit",
            value=ascii({key: config.get(key) for key in odd})[:200],
        )


def _same(found: set[str], wanted: set[str], what: str) -> None:
    odd = sorted(found ^ wanted)
    if odd:
        raise IntegrityError(f"the adapter holds other {what} than the edit", value=ascii(odd[:3])[:200])


def _dtype(file: TensorFile) -> str:
    """The narrowest dtype of the factors."""
    return min(
        (entry.dtype for name, entry in file.entries.items() if not name.endswith(_ALPHA)),
        key=lambda dtype: -TOLERANCE.get(dtype, 0.0),
        default="F32",
    )
