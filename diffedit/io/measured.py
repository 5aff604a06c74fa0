"""What was measured about an edit, beside it as `measured.json`: a claim about the edit, and no part of it.

    {"format": "diffedit-measured", "format_version": "1.0", "edit_id": ..., "metrics": [...], ...}

canonical JSON, so the same numbers give the same bytes. The edit's id names what was measured; an edit with other
numbers has another id, so what a composed, scaled or otherwise changed edit finds beside it is never taken for its own.
The id says nothing about this file, since measuring an edit must not make it another one: who needs to know that
the numbers are right measures again, on the model and with the judge that are named here by their digests.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.dataclasses import dataclass

from diffedit.errors import MalformedArtifactError, UnsupportedVersionError
from diffedit.io.manifest import Sha256, canonical_json
from diffedit.io.strict import loads

MEASURED_FILE = "measured.json"
FORMAT = "diffedit-measured"
FORMAT_VERSION = "1.0"
MAX_BYTES = 1 << 20

_VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})")
_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)
_Text = Annotated[str, StringConstraints(max_length=1000)]


@dataclass(frozen=True, config=_CONFIG)
class Metric:
    """One measured number for the card.

    Attributes:
        name: what was measured.
        value: with the edit.
        base: the same without the edit.
        interval: the 95% interval of `value`.
        n: how many pictures or prompts it is from.
        how: the judge and the prompts, in a few words.
    """

    name: _Text
    value: float
    base: float | None = None
    interval: tuple[float, float] | None = None
    n: Annotated[int, Field(ge=0)] | None = None
    how: _Text = ""


class Measured(BaseModel):
    """Numbers of one edit and where they come from.

    Attributes:
        edit_id: of the edit that was measured.
        metrics: the numbers, in the order in which the card shows them.
        model: name of the model that drew the pictures.
        weights: digests of its weights without and with the edit, empty if they were not taken.
        judge: name of what judged the pictures.
        judge_digest: of the judge's weights.
        versions: of the libraries.
    """

    model_config = ConfigDict(frozen=True, **_CONFIG)

    format: str = FORMAT
    format_version: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,4}\.[0-9]{1,4}$")] = FORMAT_VERSION
    edit_id: Sha256
    metrics: Annotated[tuple[Metric, ...], Field(max_length=1000)]
    model: _Text = ""
    weights: tuple[_Text, ...] = ()
    judge: _Text = ""
    judge_digest: _Text = ""
    versions: dict[str, _Text] = {}

    @model_validator(mode="after")
    def _known(self) -> Measured:
        if self.format != FORMAT:
            raise ValueError("another format")
        return self

    def to_json(self) -> bytes:
        """The bytes of `measured.json`."""
        return canonical_json(self.model_dump(mode="json")) + b"\n"


def decode_measured(data: bytes, where: str) -> Measured:
    """The numbers from the bytes of their file; one canonical form is accepted.

    Args:
        data: the whole file.
        where: its name, for messages.

    Raises:
        MalformedArtifactError: damaged, or not what diffedit writes.
        UnsupportedVersionError: a later diffedit wrote it.
    """
    if len(data) > MAX_BYTES:
        raise MalformedArtifactError(f"{where} is too large", value=f"over {MAX_BYTES} bytes")
    try:
        content = loads(data.decode("utf-8"), where)
    except UnicodeDecodeError as error:
        raise MalformedArtifactError(f"{where} is no text", value=str(error)[:120]) from error
    later = _later(content)
    try:
        measured = Measured.model_validate_json(data)
        same = measured.to_json() == data
    except Exception as error:  # validators see a stranger's values and may raise anything
        if later:
            raise _unsupported(where, content) from error
        raise MalformedArtifactError(
            f"{where} is not complete or not valid", value=" ".join(ascii(str(error)).split())[:300]
        ) from error
    if later == "major":
        raise _unsupported(where, content)
    if not same:
        raise MalformedArtifactError(f"{where} is not in canonical form", hint="delete it, and measure again")
    return measured


def _later(content: Any) -> str:
    """Whether the file says that it is of another "major" or a later "minor" version; "" if neither."""
    version = content.get("format_version") if isinstance(content, dict) else None
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if match is None or content.get("format") != FORMAT:
        return ""
    major, minor = (int(part) for part in FORMAT_VERSION.split("."))
    return "major" if int(match[1]) != major else "minor" if int(match[2]) > minor else ""


def _unsupported(where: str, content: Any) -> UnsupportedVersionError:
    found = f"{content['format_version']}, this is {FORMAT_VERSION}"
    return UnsupportedVersionError(f"{where} is of a later version", value=found, hint="upgrade diffedit, or delete it")
