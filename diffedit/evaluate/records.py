"""What an evaluation found, frozen, as it is written to `evaluation.json`.

Counts are kept beside every share, so that each number can be computed again from the file alone. A number that the
detector cannot vouch for is `None`, with the reason in `refused`. The file carries `format_version`; readers refuse a
later major version.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffedit.errors import MalformedArtifactError, RequestError, StorageError, UnsupportedVersionError, nearest
from diffedit.io.measured import Measured, Metric
from diffedit.request import Action, Kind

FORMAT_VERSION = "1.0"
FILE = "evaluation.json"
_MOST_BYTES = 1 << 28

Group = Literal["efficacy", "generality", "near", "far", "everyday"]
GROUPS: tuple[Group, ...] = ("efficacy", "generality", "near", "far", "everyday")
Names = tuple[str, ...]
Count = Annotated[int, Field(ge=0)]


class Frozen(BaseModel):
    """Base of the records."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Settings(Frozen):
    """What an evaluation may be told.

    Attributes:
        images: pictures per group, each drawn before and after; more narrow the intervals.
        seed: of the first picture of each group; the others count on from there.
        near: concepts close to the subject that must stay; default: the same category in the model's vocabulary, else
            the general nouns that the scorer's text tower puts nearest.
        far: other concepts that must stay; default: the rest of the vocabulary, else general nouns far away.
        neighbours: how many near concepts are chosen when none are named.
        aliases: further names of the subject, for generality; not necessarily names that the edit was given.
        everyday: prompts for fidelity; default: from the vocabulary, else a bundled list.
        least_detection: share of the unedited model's own pictures in which the detector must see what was asked for;
            below it the number is refused.
        steps: denoising steps; default: the model's own.
        guidance: classifier-free guidance scale; default: the model's own.
    """

    images: Annotated[int, Field(ge=1)] = 50
    seed: Annotated[int, Field(ge=0)] = 0
    near: Names = ()
    far: Names = ()
    neighbours: Annotated[int, Field(ge=1)] = 8
    aliases: Names = ()
    everyday: Names = ()
    least_detection: Annotated[float, Field(gt=0, le=1)] = 0.7
    steps: Annotated[int, Field(ge=1)] | None = None
    guidance: Annotated[float, Field(ge=0)] | None = None


class Rate(Frozen):
    """A share with its exact (Clopper-Pearson) 95% interval; without trials the share is `None` and says nothing."""

    hits: Count
    n: Count
    share: float | None
    low: float
    high: float

    def __str__(self) -> str:
        return "0 of 0" if self.share is None else f"{self.hits} of {self.n} ({self.low:.2f} to {self.high:.2f})"


class Part(Frozen):
    """The pictures of one concept in one kind of prompt.

    Attributes:
        name: the concept.
        kind: what the prompts have in common.
        preserved: whether the edit was asked to keep the concept.
        before: how often it is recognised in the unedited model's pictures.
        after: the same in the edited model's.
        kept: among the pictures recognised before, how many still are, with the same prompt and seed.
        refused: why the part does not count, or `None`.
    """

    name: str
    kind: str
    preserved: bool = False
    before: Rate
    after: Rate
    kept: Rate
    refused: str | None = None


class Finding(Frozen):
    """One number with its interval, or the reason why there is none.

    Attributes:
        name: `efficacy`, `generality`, `specificity_near`, `specificity_far`, `becomes_target`, `fidelity_mmd` or
            `fidelity_clip`.
        question: what it answers, in one sentence.
        better: whether more or less of it is good.
        interval: how the interval was made.
        value: the number.
        low: lower end of the 95% interval.
        high: upper end.
        n: pairs of pictures behind it.
        before: the unedited model's own figure, where there is one.
        refused: why there is no number.
        parts: what it is pooled from.
    """

    name: str
    question: str
    better: Literal["higher", "lower"]
    interval: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: Count = 0
    before: float | None = None
    refused: str | None = None
    parts: tuple[Part, ...] = ()

    @property
    def left_out(self) -> tuple[Part, ...]:
        """The parts that do not count."""
        return tuple(part for part in self.parts if part.refused)

    @property
    def unjudged(self) -> Names:
        """Concepts that the number says nothing about: none of their parts counts."""
        judged = {part.name for part in self.parts if not part.refused}
        return tuple(dict.fromkeys(part.name for part in self.parts if part.name not in judged))


class Picture(Frozen):
    """One pair of pictures, same prompt and seed.

    Attributes:
        group: what it was drawn for.
        name: the concept that it should show; empty for everyday prompts.
        kind: the part that it belongs to.
        prompt: the prompt.
        seed: the seed.
        before: file of the unedited model's picture, relative to the folder.
        after: file of the edited model's picture.
        seen_before: what the detector names it; empty for everyday prompts.
        seen_after: the same after the edit.
        clip_before: cosine of the picture with its prompt.
        clip_after: the same after the edit.
    """

    group: Group
    name: str
    kind: str
    prompt: str
    seed: int
    before: str
    after: str
    seen_before: str
    seen_after: str
    clip_before: float
    clip_after: float


class Concept(Frozen):
    """One request of the edit."""

    subject: str
    action: Action
    kind: Kind
    target: str | None


class Evaluation(Frozen):
    """A finished evaluation.

    Attributes:
        edit_id: of the edit.
        concepts: what it changes.
        model: name of the base; of a path only the last part.
        weights: digests of the model that drew the pictures, before and after.
        scorer: name of the judge.
        scorer_digest: of its weights.
        settings: as resolved: steps and guidance are filled in.
        findings: the numbers.
        mmd_scale: the CLIP-MMD between the unedited model's pictures of the subject and its everyday pictures: what a
            large distance is.
        pictures: every pair.
        versions: of diffedit and what it ran on.
    """

    format_version: str = FORMAT_VERSION
    edit_id: str
    concepts: tuple[Concept, ...]
    model: str
    weights: tuple[str, str]
    scorer: str
    scorer_digest: str
    settings: Settings
    findings: tuple[Finding, ...]
    mmd_scale: float | None = None
    pictures: tuple[Picture, ...]
    versions: dict[str, str]

    def finding(self, name: str) -> Finding:
        """The finding of that name.

        Raises:
            RequestError: there is none.
        """
        for found in self.findings:
            if found.name == name:
                return found
        hint = nearest(name, [found.name for found in self.findings])
        raise RequestError("the evaluation has no such finding", value=repr(name), hint=hint)

    def metrics(self) -> tuple[Metric, ...]:
        """The numbers for a model card; refused ones are left out."""
        return tuple(
            Metric(
                name=found.name.replace("_", " "),
                value=found.value,
                base=found.before,
                interval=None if found.low is None or found.high is None else (found.low, found.high),
                n=found.n,
                how=f"{found.question} Judged by {self.scorer}.",
            )
            for found in self.findings
            if found.value is not None
        )

    def measured(self) -> Measured:
        """The numbers as an edit keeps them: `edit.record(found.measured())`."""
        return Measured(
            edit_id=self.edit_id,
            metrics=self.metrics(),
            model=self.model,
            weights=self.weights,
            judge=self.scorer,
            judge_digest=self.scorer_digest,
            versions=self.versions,
        )

    def to_json(self) -> bytes:
        """The content of `evaluation.json`; the same evaluation gives the same bytes."""
        return (self.model_dump_json(indent=2) + "\n").encode("utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read an evaluation from its folder or file.

        Raises:
            StorageError: it cannot be read.
            MalformedArtifactError: it is none.
            UnsupportedVersionError: a later diffedit wrote it.
        """
        file = Path(path).expanduser()
        file = file / FILE if file.is_dir() else file
        try:
            with open(file, "rb") as stream:
                data = stream.read(_MOST_BYTES)
        except OSError as error:
            raise StorageError("the evaluation cannot be read", value=repr(file.name), cause=error.strerror) from error
        try:
            found: Any = _Version.model_validate_json(data).format_version
            if found.split(".")[0] != FORMAT_VERSION.split(".")[0]:
                raise UnsupportedVersionError(
                    "the evaluation has another format version", value=found, hint="use the diffedit that wrote it"
                )
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise MalformedArtifactError(
                "this is no evaluation", value=repr(file.name), cause=f"{where}: {first['msg']}".lstrip(": ")
            ) from error


class _Version(BaseModel):
    format_version: str
