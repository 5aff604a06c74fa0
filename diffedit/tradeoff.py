"""What an edit reaches against what it costs, for every strength of the regularisation, from the edit alone.

`QuickFix` multiplies `lam` and `everyday_weight` by one factor t, chosen so that at most the share `give_up` of what
could be reached is lost. This is the whole curve from which it was chosen: per t the efficacy at the edited layer,
1 - |E| / |R|, how far preserved names move, |D Q| / |R|, and the change of everyday outputs,

    everyday drift = sqrt(tr(D A0 D^T) / mu) / rms(r)

an upper bound of the root mean square shift of an everyday token, in units of the shift that a paired token was asked
for (A0 = lam I + mu C, see `linalg.metric`). It is computed from the pairs that the edit keeps, in milliseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffedit import registry
from diffedit.errors import NotComposableError
from diffedit.figures import new_figure, write_figure
from diffedit.linalg.curve import TradeOff
from diffedit.site import EditSite
from diffedit.updaters.closed_form import QuickFix

if TYPE_CHECKING:
    from diffedit.edit import Edit

_INK, _ACCENT, _THIRD = "#1b1f24", "#0b6e6e", "#b4540a"
_TOP = 1.25
_DECADES = range(-5, 6)
_STEPS = (1.0, 10 ** (1 / 3), 10 ** (2 / 3))


@dataclass(frozen=True)
class Point:
    """One factor and what it would give.

    Attributes:
        factor: what lam and everyday_weight are multiplied by.
        efficacy: share of the request carried out at the layer, 0 to 1.
        everyday_drift: see the module's text; `None` if everyday captions are not held.
        preserve_drift: shift of the preserved keys, in units of the request; 0 without any.
    """

    factor: float
    efficacy: float
    everyday_drift: float | None
    preserve_drift: float


@dataclass(frozen=True)
class TradeOffCurve:
    """The curve of one edit site.

    Attributes:
        site: where.
        points: by rising factor.
        chosen: the point that the edit was solved with.
    """

    site: EditSite
    points: tuple[Point, ...]
    chosen: Point


def trade_off(edit: Edit) -> tuple[TradeOffCurve, ...]:
    """The curves of an edit, one per site; no model is needed.

    Args:
        edit: made by `quickfix`, or loaded from a folder with its `pairs.safetensors`.

    Raises:
        NotComposableError: another method made it, or it has no pairs.
        RequestError: it was solved without a metric (everyday=0 and give_up=None).
    """
    record = edit.manifest.updater
    updater = registry.get("updaters", record.name).model_validate(record.settings)
    if not isinstance(updater, QuickFix) or not edit.delta.pairs:
        raise NotComposableError(
            "the edit has no trade-off to show",
            value=record.name,
            cause="only quickfix has one, and it needs the pairs that it was solved from",
        )
    curves = []
    for site, pairs in edit.delta.pairs.items():
        curve = updater.trade_off(pairs)
        count = sum(entry.count for entry in pairs.wanted)
        factor = updater.factor(pairs, curve)
        grid = [step * 10.0**decade for decade in _DECADES for step in _STEPS]
        *points, chosen = (_point(updater, curve, count, t) for t in (*grid, factor))
        curves.append(TradeOffCurve(site, tuple(points), chosen))
    return tuple(curves)


def _point(updater: QuickFix, curve: TradeOff, count: int, t: float) -> Point:
    wanted = curve.wanted or 1.0
    drift = math.sqrt(curve.cost(t) * count / updater.everyday_weight) / wanted if updater.everyday else None
    return Point(t, curve.efficacy(t), drift, curve.undone(t)[1] / wanted)


def draw_trade_off(curves: tuple[TradeOffCurve, ...], path: str | Path) -> Path:
    """The curves as a picture: efficacy and drifts against the factor, the chosen one marked.

    Args:
        curves: from `trade_off`.
        path: a .png, .svg or .pdf file.

    Raises:
        RequestError: another kind of file.
        StorageError: it cannot be written.
        UnsupportedModelError: matplotlib is missing.
    """
    figure = new_figure(Path(path), 6.4, 0.6 + 2.6 * len(curves))
    for axes, curve in zip(figure.subplots(len(curves), 1, squeeze=False)[:, 0], curves, strict=True):
        lines = [("efficacy", "-", _INK, [p.efficacy for p in curve.points])]
        if curve.chosen.everyday_drift is not None:
            lines.append(("everyday drift", "--", _ACCENT, [p.everyday_drift or 0.0 for p in curve.points]))
        if any(p.preserve_drift for p in curve.points):
            lines.append(("preserved names' drift", ":", _THIRD, [p.preserve_drift for p in curve.points]))
        for label, style, colour, values in lines:
            axes.plot([p.factor for p in curve.points], values, style, color=colour, label=label, linewidth=2)
        axes.axvline(curve.chosen.factor, color="#9aa1aa", linewidth=1)
        axes.plot([curve.chosen.factor], [curve.chosen.efficacy], "o", color=_INK)
        axes.annotate(
            f"chosen {curve.chosen.factor:.3g}: efficacy {curve.chosen.efficacy:.0%}",
            (curve.chosen.factor, curve.chosen.efficacy),
            xytext=(8, 10),
            textcoords="offset points",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
        axes.set_xscale("log")
        axes.set_ylim(0, _TOP)
        axes.set_title(curve.site.name, fontsize=9)
        axes.set_xlabel("factor on lam and everyday_weight", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e4e7eb", linewidth=0.8)
        axes.legend(fontsize=8, frameon=False, loc="upper right")
    return write_figure(figure, Path(path))
