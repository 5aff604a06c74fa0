"""Requirements on an evaluation, for pipelines: `efficacy>=0.9` is met or missed, and never passes without evidence.

A requirement is missed when its number was refused, and when a concept behind it could not be judged at all: what was
not seen is not proven. By default the number itself decides; by the bound of its interval is stricter, for then chance
has to be ruled out as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

from diffedit.errors import RequestError, nearest
from diffedit.evaluate.records import Evaluation, Frozen

Basis = Literal["point", "bound"]
NAMES = (
    "efficacy",
    "generality",
    "specificity_near",
    "specificity_far",
    "becomes_target",
    "fidelity_mmd",
    "fidelity_clip",
)
_FORM = re.compile(r"\s*(\w+)\s*(>=|<=)\s*(\S+)\s*")


class Requirement(Frozen):
    """A bound on one finding.

    Attributes:
        name: of the finding.
        relation: `>=` or `<=`.
        bound: what it is compared with.
    """

    name: str
    relation: Literal[">=", "<="]
    bound: float

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Read `name>=number` or `name<=number`.

        Raises:
            RequestError: it reads otherwise, or there is no such finding.

        >>> Requirement.parse("specificity_near >= 0.95").bound
        0.95
        """
        found = _FORM.fullmatch(text)
        try:
            bound = float(found[3]) if found else math.nan
        except ValueError:
            bound = math.nan
        if found is None or not math.isfinite(bound):
            raise RequestError(
                "a requirement reads NAME>=NUMBER or NAME<=NUMBER", value=repr(text), hint='write "efficacy>=0.9"'
            )
        if found[1] not in NAMES:
            raise RequestError("nothing of that name is measured", value=repr(found[1]), hint=nearest(found[1], NAMES))
        return cls(name=found[1], relation=">=" if found[2] == ">=" else "<=", bound=bound)

    def __str__(self) -> str:
        return f"{self.name} {self.relation} {self.bound:g}"


class Verdict(Frozen):
    """Whether a requirement is met.

    Attributes:
        requirement: as text.
        met: whether it is.
        judged: the number that was compared: the value, or the end of its interval.
        reason: why it is not met, in a sentence; empty if it is.
    """

    requirement: str
    met: bool
    judged: float | None
    reason: str = ""


def judge(evaluation: Evaluation, requirements: Sequence[Requirement], basis: Basis = "point") -> tuple[Verdict, ...]:
    """One verdict per requirement.

    Args:
        evaluation: the evaluation.
        requirements: what is asked.
        basis: `point` compares the value, `bound` the unfavourable end of its 95% interval.
    """
    return tuple(_verdict(evaluation, requirement, basis) for requirement in requirements)


def _verdict(evaluation: Evaluation, requirement: Requirement, basis: Basis) -> Verdict:
    found = evaluation.finding(requirement.name)
    more = requirement.relation == ">="
    judged = found.value if basis == "point" else found.low if more else found.high
    text = str(requirement)
    if found.value is None or judged is None:
        return Verdict(requirement=text, met=False, judged=None, reason=found.refused or "there is no number")
    if found.unjudged and found.name in ("efficacy", "generality"):
        reason = f"it says nothing about {', '.join(found.unjudged)}: {found.left_out[0].refused}"
        return Verdict(requirement=text, met=False, judged=judged, reason=reason)
    met = judged >= requirement.bound if more else judged <= requirement.bound
    what = "" if basis == "point" else "the lower end of its interval, " if more else "the upper end of its interval, "
    short = f"{what}{judged:.4g}{',' if what else ''} is {'below' if more else 'above'} {requirement.bound:g}"
    return Verdict(requirement=text, met=met, judged=judged, reason="" if met else short)
