"""The benchmark's pictures: efficacy against specificity, and what the edited models draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.methods.plan import BEST, DEFAULT, Record
from benchmarks.methods.pool import pooled
from benchmarks.methods.table import METHODS, REFERENCE
from benchmarks.methods.tables import HEADS, entries

_INK, _FAINT, _ACCENT = "#1b1f24", "#9aa1aa", "#0b6e6e"
_MARKERS = "oDPsv^<>X*hdp"
_CONCEPTS = 4


def pareto(records: Sequence[Record], path: Path) -> bool:
    """Efficacy against specificity, a marker per method; hollow: default, filled: best. `False`: nothing to show."""
    from matplotlib.figure import Figure

    by = entries(records)
    figure = Figure(figsize=(9.2, 4.0), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    handles: dict[str, Any] = {}
    for panel, axis in zip(panels, ("specificity_near", "specificity_far"), strict=True):
        for (method, role), mine in by.items():
            x, y = pooled(axis, mine), pooled("efficacy", mine)
            if x.value is None or y.value is None:
                continue
            alone = role == DEFAULT and (method, BEST) not in by
            colour = _ACCENT if METHODS[method].updater == REFERENCE else _INK
            face = colour if role == BEST or alone else "white"
            panel.plot([x.low, x.high], [y.value] * 2, color=_FAINT, linewidth=0.8, zorder=1)
            panel.plot([x.value] * 2, [y.low, y.high], color=_FAINT, linewidth=0.8, zorder=1)
            marker = _MARKERS[list(METHODS).index(method) % len(_MARKERS)]
            style: dict[str, Any] = {"marker": marker, "ms": 7.5, "mec": colour, "mfc": face, "linestyle": ""}
            handles[method] = panel.plot([x.value], [y.value], zorder=3, **style)[0]
        _axes(panel, HEADS[axis])
    if not handles:
        return False
    panels[0].set_ylabel("efficacy", fontsize=9, color=_INK)
    legend = figure.legend(
        handles.values(), handles, loc="outside right center", fontsize=8, frameon=False, title="filled: best"
    )
    legend.get_title().set_fontsize(8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return True


def _axes(axes: Any, label: str) -> None:
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    ticks = [0, 0.25, 0.5, 0.75, 1]
    names = ["0%", "25%", "50%", "75%", "100%"]
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)
    axes.tick_params(labelsize=8, colors=_INK, length=0)
    axes.set_xlabel(label, fontsize=9, color=_INK)
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(_FAINT)


def gallery(strips: Path, part: str, concepts: Sequence[str], path: Path) -> bool:
    """One row per method, one strip per concept, from what the run kept. `False`: it kept nothing for them."""
    from matplotlib.figure import Figure

    chosen = list(concepts)[:_CONCEPTS]
    rows = ("unedited", *(name for name, method in METHODS.items() if not method.part))
    found: Mapping[tuple[str, str], Path] = {
        (name, concept): strips / f"{part}-{concept.replace(' ', '-')}-{name}.png"
        for name in rows
        for concept in chosen
    }
    shown = [name for name in rows if any(found[name, concept].is_file() for concept in chosen)]
    if len(shown) < 2:
        return False
    figure = Figure(figsize=(2.6 * len(chosen) + 1.2, 0.62 * len(shown) + 0.7), layout="constrained")
    grid: Any = figure.subplots(len(shown), len(chosen), squeeze=False)
    for i, name in enumerate(shown):
        for j, concept in enumerate(chosen):
            axes = grid[i][j]
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if found[name, concept].is_file():
                with Image.open(found[name, concept]) as image:
                    axes.imshow(image.convert("RGB"), interpolation="nearest")
            if j == 0:
                axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8, color=_INK)
            if i == 0:
                axes.set_title(f"edit of {concept}", fontsize=9, color=_INK, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True
