"""From what the judge sees to the findings: pooled, paired by seed, and refused where the detector is blind.

    kept     among the pictures recognised before, those still recognised with the same prompt and seed
    efficacy, generality = 1 - kept        of the subject
    specificity          = kept            of other concepts

So an edit that changes nothing has efficacy 0 and specificity 1 whatever the detector misses, and what the unedited
model cannot draw counts for nothing. The price: a detector's slips between two equally good pictures count against
the edit. A subject's part counts if the detector recognises at least `least_detection` of the unedited model's own
pictures of it; near and far concepts are pooled first, for each has only a few pictures.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np

from diffedit.evaluate.metrics import Array, clip_kept, complement, margin, paired_mmd, rate
from diffedit.evaluate.records import Finding, Group, Part, Picture, Rate

EXACT, BOOTSTRAP = "Clopper-Pearson", "bootstrap over pairs"
QUESTIONS = {
    "efficacy": "Of the pictures that showed the subject, how many no longer do, in the prompts of the edit?",
    "generality": "The same in prompts that the edit never saw: other templates, other names, compositions.",
    "becomes_target": "Of the pictures that showed the subject, how many show the target now?",
    "specificity_near": "Of the pictures that showed a near concept, how many still do?",
    "specificity_far": "Of the pictures that showed another concept, how many still do?",
    "fidelity_mmd": "How far did the everyday pictures move as a whole (CLIP-MMD, 0: not at all)?",
    "fidelity_clip": "How much of the everyday pictures' CLIPScore is left?",
}


def rates(pictures: Sequence[Picture], preserved: Collection[str], least: float) -> list[Finding]:
    """Efficacy, generality and both specificities, from what the detector saw."""
    return [
        _subject("efficacy", [item for item in pictures if item.group == "efficacy"], least),
        _subject("generality", [item for item in pictures if item.group == "generality"], least),
        _others("specificity_near", [item for item in pictures if item.group == "near"], preserved, least),
        _others("specificity_far", [item for item in pictures if item.group == "far"], preserved, least),
    ]


def becomes_target(efficacy: Finding, pictures: Sequence[Picture], targets: Mapping[str, Sequence[str]]) -> Finding:
    """What the pictures that showed a subject show now, where the detector knows the target."""
    if efficacy.value is None:
        return _refused("becomes_target", efficacy.refused or "", EXACT)
    judged = {part.name for part in efficacy.parts if not part.refused and targets.get(part.name)}
    if not judged:
        return _refused("becomes_target", "the detector does not know the target as a name of its own", EXACT)
    showed = [p for p in pictures if p.group == "efficacy" and p.name in judged and _same(p.seen_before, p.name)]
    hits = sum(any(_same(p.seen_after, target) for target in targets[p.name]) for p in showed)
    return _from_rate("becomes_target", rate(hits, len(showed)), (), None)


def fidelity(pictures: Sequence[Picture], before: Array, after: Array, texts: Array) -> list[Finding]:
    """CLIP-MMD and CLIPScore of the everyday pictures.

    Args:
        pictures: the everyday pictures.
        before: [n, d] their unit vectors.
        after: [n, d].
        texts: [n, d] unit vectors of their prompts.
    """
    n = len(pictures)
    if n < 2:
        few = f"it takes at least two everyday pictures, and there are {n}"
        return [_refused(name, few, BOOTSTRAP) for name in ("fidelity_mmd", "fidelity_clip")]
    value, (low, high) = paired_mmd(before, after)
    moved = _finding("fidelity_mmd", "lower", BOOTSTRAP, value=value, low=low, high=high, n=n)
    cosines = before @ texts.T
    own, fits = np.diag(cosines), margin(cosines, [item.prompt for item in pictures])
    if fits is None or fits <= 0 or np.maximum(own, 0).sum() <= 0:
        why = (
            "all everyday prompts are the same"
            if fits is None
            else "the judge does not see that the unedited model's pictures fit their own prompts better than others'"
        )
        return [moved, _refused("fidelity_clip", why, BOOTSTRAP)]
    kept, (low, high) = clip_kept(own, (after * texts).sum(1))
    return [moved, _finding("fidelity_clip", "higher", BOOTSTRAP, value=kept, low=low, high=high, n=n, before=1.0)]


def _subject(name: str, pictures: Sequence[Picture], least: float) -> Finding:
    keys = dict.fromkeys((item.name, item.kind) for item in pictures)
    parts = []
    for subject, kind in keys:
        part = _part(subject, kind, [p for p in pictures if (p.name, p.kind) == (subject, kind)])
        parts.append(part.model_copy(update={"refused": _blind(part.before, repr(subject), least)}))
    judged = [part for part in parts if not part.refused]
    if not judged:
        why = parts[0].refused if parts and parts[0].refused else "there are no such prompts"
        return _refused(name, why, EXACT, tuple(parts))
    pooled = complement(_pool([part.kept for part in judged]))
    return _from_rate(name, pooled, tuple(parts), 0.0)


def _others(name: str, pictures: Sequence[Picture], preserved: Collection[str], least: float) -> Finding:
    keys = dict.fromkeys((item.name, item.kind) for item in pictures)
    parts = tuple(
        _part(concept, kind, [p for p in pictures if p.name == concept], concept.casefold() in preserved)
        for concept, kind in keys
    )
    if not parts:
        return _refused(name, "there are no such concepts: name some", EXACT)
    before = _pool([part.before for part in parts])
    blind = _blind(before, f"the {len(parts)} concepts", least)
    if blind:
        return _refused(name, blind, EXACT, parts)
    return _from_rate(name, _pool([part.kept for part in parts]), parts, 1.0)


def _part(name: str, kind: str, pictures: Sequence[Picture], preserved: bool = False) -> Part:
    first = [_same(item.seen_before, name) for item in pictures]
    last = [_same(item.seen_after, name) for item in pictures]
    return Part(
        name=name,
        kind=kind,
        preserved=preserved,
        before=rate(sum(first), len(first)),
        after=rate(sum(last), len(last)),
        kept=rate(sum(a and b for a, b in zip(first, last, strict=True)), sum(first)),
    )


def _blind(before: Rate, what: str, least: float) -> str | None:
    if before.share is not None and before.hits and before.share >= least:
        return None
    return (
        f"the detector does not see {what} in the unedited model's own pictures: recognised in {before}, "
        f"and at least {least:.0%} are needed"
    )


def _pool(rates: Sequence[Rate]) -> Rate:
    return rate(sum(item.hits for item in rates), sum(item.n for item in rates))


def _same(seen: str, name: str) -> bool:
    return seen.casefold() == name.casefold()


def _from_rate(name: str, found: Rate, parts: tuple[Part, ...], before: float | None) -> Finding:
    numbers = {"value": found.share, "low": found.low, "high": found.high, "n": found.n}
    return _finding(name, "higher", EXACT, **numbers, before=before, parts=parts)


def _refused(name: str, why: str, interval: str, parts: tuple[Part, ...] = ()) -> Finding:
    better: Literal["higher", "lower"] = "lower" if name == "fidelity_mmd" else "higher"
    return _finding(name, better, interval, refused=why, parts=parts)


def _finding(name: str, better: Literal["higher", "lower"], interval: str, **fields: object) -> Finding:
    return Finding.model_validate(
        {"name": name, "question": QUESTIONS[name], "better": better, "interval": interval, **fields}
    )


def heading(group: Group) -> str:
    """The heading of a group, for people."""
    return {
        "efficacy": "The subject, in the prompts of the edit",
        "generality": "The subject, in prompts that the edit never saw",
        "near": "Near concepts",
        "far": "Other concepts",
        "everyday": "Everyday prompts",
    }[group]
