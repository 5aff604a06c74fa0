"""The report's plots, as SVG: readable on paper and without colour, and the same bytes for the same numbers.

Names that a person chose are drawn as they are, never read as mathematics, and as text, so that the reader's own fonts
serve the scripts that matplotlib's does not know; the report embeds each plot as an image, in which nothing runs.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

from diffedit.evaluate.records import Evaluation, Finding, Part, Picture

RATES = ("efficacy", "generality", "specificity_near", "specificity_far")
_INK, _FAINT, _ACCENT = "#1b1f24", "#9aa1aa", "#0b6e6e"
_MOST_CONCEPTS = 24


def rates_plot(evaluation: Evaluation) -> bytes | None:
    """Each share with its interval, on one scale; `None` if every one was refused."""
    shown = [found for found in evaluation.findings if found.name in RATES and found.value is not None]
    if not shown:
        return None
    figure, axes = _figure(6.4, 0.75 + 0.42 * len(shown))
    for row, found in enumerate(reversed(shown)):
        _interval(axes, row, found)
    _rows(axes, [found.name.replace("_", ", ") for found in reversed(shown)])
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.8)
    return _svg(figure)


def concepts_plot(parts: Sequence[Part]) -> bytes | None:
    """How often each concept is recognised before (ring) and after (dot); `None` without concepts."""
    shown = sorted(parts, key=lambda part: ((part.after.share or 0) - (part.before.share or 0), part.name))
    shown = shown[:_MOST_CONCEPTS][::-1]
    if not shown:
        return None
    figure, axes = _figure(6.4, 0.9 + 0.27 * len(shown))
    for row, part in enumerate(shown):
        before, after = part.before.share or 0.0, part.after.share or 0.0
        axes.plot([before, after], [row, row], color=_FAINT, linewidth=2, zorder=1)
        axes.plot([before], [row], "o", ms=9, mfc="white", mec=_INK, zorder=2)
        axes.plot([after], [row], "o", ms=4.5, color=_ACCENT, zorder=3)
    _rows(axes, [f"{_short(part.name)} ({part.before.n})" for part in shown])
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("recognised: ring before, dot after; in brackets the pictures", fontsize=8, color=_INK)
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.8)
    return _svg(figure)


def clip_plot(pictures: Sequence[Picture]) -> bytes | None:
    """Cosine of every everyday picture with its prompt, before against after; `None` without pictures."""
    if not pictures:
        return None
    before, after = [item.clip_before for item in pictures], [item.clip_after for item in pictures]
    low, high = min(before + after), max(before + after)
    pad = 0.06 * (high - low) or 0.05
    figure, axes = _figure(3.6, 3.4)
    axes.plot([low - pad, high + pad], [low - pad, high + pad], color=_FAINT, linewidth=1)
    axes.plot(before, after, "o", ms=5, mfc="none", mec=_ACCENT)
    axes.set_xlim(low - pad, high + pad)
    axes.set_ylim(low - pad, high + pad)
    axes.set_aspect("equal")
    axes.set_xlabel("fit with the prompt, before", fontsize=8, color=_INK)
    axes.set_ylabel("after", fontsize=8, color=_INK)
    axes.grid(color="#e4e7eb", linewidth=0.8)
    return _svg(figure)


def _interval(axes: Any, row: int, found: Finding) -> None:
    axes.plot([found.low, found.high], [row, row], color=_INK, linewidth=1.6, solid_capstyle="butt", zorder=2)
    for end in (found.low, found.high):
        axes.plot([end, end], [row - 0.13, row + 0.13], color=_INK, linewidth=1.6, zorder=2)
    axes.plot([found.value], [row], "D", ms=6.5, color=_ACCENT, zorder=3)


def _rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9, color=_INK)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.set_ylim(-0.6, len(names) - 0.4)


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Any = figure.subplots()
    axes.tick_params(labelsize=8, colors=_INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    return figure, axes


def _svg(figure: Any) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "diffedit", "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return buffer.getvalue()
