"""The picture of a causal trace: effect per layer and token, readable on paper and without colour.

Columns are layers in running order, rows are token positions, one panel per kind of part. Light means nothing, dark
much; negative effects are hatched, whatever their size. Cells whose interval lies above zero carry their number; the
best one has a frame.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffedit.figures import new_figure, write_figure

if TYPE_CHECKING:
    from diffedit.locators.table import Effect, TraceTable

_MOST_NUMBERS = 16
_TITLES = {"signed": "indirect effect", "absolute": "absolute indirect effect", "raw": "score of the restored run"}


def draw(table: TraceTable, path: Path, effect: Effect) -> Path:
    """Write the heat map to `path`; see `CausalTrace.plot`."""
    kinds = list(dict.fromkeys(part.kind for part in table.parts))
    scores = table.scores(effect)
    most = max(sum(part.kind == kind for part in table.parts) for kind in kinds)
    rows = len(table.columns)
    figure = new_figure(path, 2.6 + 0.62 * max(most, 5), 1.5 + len(kinds) * (0.75 + 0.42 * rows))
    panels: Any = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
    low, high = _span(scores) if effect == "raw" else (0.0, max(float(np.nanmax(scores)), 1e-12))
    for panel, kind in zip(panels, kinds, strict=True):
        _panel(panel, table, scores, kind, (low, high), effect, numbers=most <= _MOST_NUMBERS)
    image = panels[0].images[0]
    figure.colorbar(image, ax=list(panels), shrink=0.8, label=_TITLES[effect], pad=0.03)
    total = table.total_effect
    prompts = len({(unit.prompt, unit.subject) for unit in table.units})
    figure.suptitle(
        f"{table.component}: total effect {total.mean:.3g} [{total.low:.3g}, {total.high:.3g}], "
        f"{prompts} prompts, {len(table.units)} runs",
        fontsize=10,
    )
    return write_figure(figure, path)


def _panel(
    panel: Any, table: TraceTable, scores: Any, kind: str, span: tuple[float, float], effect: str, *, numbers: bool
) -> None:
    from matplotlib.patches import Rectangle

    index = [i for i, part in enumerate(table.parts) if part.kind == kind]
    values = scores[index].T
    panel.imshow(np.maximum(values, 0) if effect == "signed" else values, cmap="Greys", vmin=span[0], vmax=span[1])
    panel.set_xticks(range(len(index)), [str(table.parts[i].layer) for i in index], fontsize=8)
    panel.set_yticks(range(len(table.columns)), [name.replace("_", " ") for name in table.columns], fontsize=8)
    panel.set_title(kind.replace("_", "-"), fontsize=9, loc="left")
    panel.set_xlabel("layer" if table.window == 1 else f"first layer of {table.window}", fontsize=8)
    width = len(table.columns)
    best = divmod(int(np.nanargmax(scores)), width)
    for x, part in enumerate(index):
        for y in range(width):
            state, value = table.states[part * width + y], scores[part, y]
            if np.isnan(value):
                continue
            if effect == "signed" and value < 0:
                panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="///", lw=0, ec="0.5"))
            ink = "white" if abs(value) - span[0] > 0.55 * (span[1] - span[0]) else "black"
            if numbers and state.causal:
                text = f"{value:.2g}" if abs(value) >= 1e-3 else f"{value:.0e}"
                panel.text(x, y, text, ha="center", va="center", fontsize=6, color=ink)
            if (part, y) == best:
                panel.add_patch(Rectangle((x - 0.42, y - 0.4), 0.84, 0.8, fill=False, lw=1.6, ec=ink))


def _span(scores: Any) -> tuple[float, float]:
    return float(np.nanmin(scores)), float(np.nanmax(scores))
