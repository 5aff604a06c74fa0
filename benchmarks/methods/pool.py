"""From the counts of single edits to one number per method, with an interval that knows that concepts differ.

    kept  = sum over concepts of (recognised before and after) / sum over concepts of (recognised before)
    efficacy, generality = 1 - kept,        specificity = kept

Pictures of one concept are alike, so the interval resamples concepts (percentile bootstrap, fixed seed), and it is
never narrower than the exact (Clopper-Pearson) one for that many independent pictures: where every concept agrees, the
bootstrap alone would claim certainty. For an edit of many concepts at once the named concepts are resampled.

A detector that does not see a concept in the unedited model's own pictures says nothing: a subject below `LEAST` is
left out and named, a kind of prompt below it (over all concepts) is left out and named, and near or far concepts
below it are refused as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from diffedit.evaluate.metrics import rate

LEAST = 0.7
RESAMPLES = 2000
GROUPS = {"efficacy": "efficacy", "generality": "generality", "specificity_near": "near", "specificity_far": "far"}
MEANS = ("fidelity_mmd", "fidelity_clip")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Pooled:
    """One number over several concepts.

    Attributes:
        value: the number, or `None` if it is refused.
        low: lower end of the 95% interval.
        high: upper end.
        n: pictures that count: those in which the concept was recognised before.
        concepts: concepts behind it.
        left_out: concepts and kinds of prompt that do not count, and why.
        refused: why there is no number.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    concepts: int = 0
    left_out: tuple[str, ...] = ()
    refused: str | None = None


def pooled(name: str, records: Sequence[Mapping[str, Any]], resamples: int = RESAMPLES) -> Pooled:
    """A finding over the records of several edits.

    Args:
        name: `efficacy`, `generality`, `specificity_near`, `specificity_far`, `becomes_target`, `fidelity_mmd` or
            `fidelity_clip`.
        records: of the edits; those that were refused count for nothing here.
        resamples: of the bootstrap; 0 leaves the exact interval.
    """
    made = [record for record in records if not record.get("refused")]
    if not made:
        return Pooled(refused=records[0]["refused"] if records else "not measured")
    if name in MEANS:
        return _mean([record[name] for record in made if record.get(name) is not None], resamples)
    if name == "becomes_target":
        return _share([(r["becomes"]["hits"], r["becomes"]["n"]) for r in made if r.get("becomes")], (), resamples)
    rows = [
        {**row, "edit": i} for i, record in enumerate(made) for row in record["rows"] if row["group"] == GROUPS[name]
    ]
    judged, left_out = _seen(name, rows)
    if not judged:
        return Pooled(left_out=left_out, refused="the detector does not see them in the unedited model's own pictures")
    by_edit = len(made) > 1
    clusters: dict[Any, list[int]] = {}
    for row in judged:
        total = clusters.setdefault(row["edit"] if by_edit else row["name"], [0, 0])
        kept = row["kept"] if name.startswith("specificity") else row["before"] - row["kept"]
        total[0] += kept
        total[1] += row["before"]
    return _share([(hits, n) for hits, n in clusters.values()], left_out, resamples)


def harmonic(values: Sequence[float]) -> float:
    """Harmonic mean; 0 if one of them is.

    >>> harmonic([1.0, 0.5]), harmonic([1.0, 0.0])
    (0.6666666666666666, 0.0)
    """
    return len(values) / sum(1 / value for value in values) if values and min(values) > 0 else 0.0


def _seen(name: str, rows: Sequence[Row]) -> tuple[list[Row], tuple[str, ...]]:
    """The rows that count, and what does not."""
    if name == "efficacy":
        by: Callable[[Row], Any] = lambda row: row["name"]  # noqa: E731
    elif name == "generality":
        by = lambda row: row["kind"]  # noqa: E731
    else:
        by = lambda row: "all"  # noqa: E731
    judged: list[Row] = []
    left_out = []
    for key in dict.fromkeys(by(row) for row in rows):
        mine = [row for row in rows if by(row) == key]
        found = rate(sum(row["before"] for row in mine), sum(row["n"] for row in mine))
        if found.share is not None and found.hits and found.share >= LEAST:
            judged += mine
        elif found.n:
            left_out.append(f"{key} (recognised before in {found.hits} of {found.n})")
    return judged, tuple(left_out)


def _share(clusters: Sequence[tuple[int, int]], left_out: tuple[str, ...], resamples: int) -> Pooled:
    counted = [(hits, n) for hits, n in clusters if n]
    exact = rate(sum(hits for hits, _ in counted), sum(n for _, n in counted))
    if exact.share is None:
        return Pooled(left_out=left_out, refused="no picture counts")
    low, high = exact.low, exact.high
    if resamples and len(counted) > 1:
        pairs = np.array(counted, dtype=np.float64)
        sums = _draws(len(counted), resamples) @ pairs
        span = np.quantile(sums[:, 0] / sums[:, 1], (0.025, 0.975))
        low, high = min(low, float(span[0])), max(high, float(span[1]))
    return Pooled(exact.share, low, high, exact.n, len(counted), left_out)


def _mean(values: Sequence[float], resamples: int) -> Pooled:
    if not values:
        return Pooled(refused="refused for every concept")
    low = high = fmean(values)
    if resamples and len(values) > 1:
        means = _draws(len(values), resamples) @ np.array(values) / len(values)
        low, high = (float(end) for end in np.quantile(means, (0.025, 0.975)))
    return Pooled(fmean(values), low, high, len(values), len(values))


def _draws(n: int, resamples: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
