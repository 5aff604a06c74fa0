"""What an edit file says about itself: one frozen pydantic model, stored as canonical JSON inside the file.

No time, host or path of a machine goes in: the same edit gives the same bytes. `edit_id` is the SHA-256 of the
canonical manifest without the id itself: it covers requests, settings, base, results and, by hash, the tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticSerializationError

from diffedit.delta import Diagnostics, TrainingDiagnostics
from diffedit.errors import RequestError
from diffedit.request import Request
from diffedit.site import EditSite, Location, Role, TokenRule

FORMAT = "diffedit-edit"
FORMAT_VERSION = "1.0"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants")


class SiteRecord(_Frozen):
    """One edited layer: what it is, what it was, what the edit made of it.

    Attributes:
        base_sha256: hash of the unedited weight per dtype name ("float32", "float16", "bfloat16"): the model's own and
            every narrower one, so that a half-precision copy of the base is recognised.
        result_sha256: hash of the weight after applying this edit alone to the base in `dtype`; `None` for an edit that
            was composed or scaled and has not met a model since.
        achieved: share of the requested change that survived the rounding to `dtype`; `None` likewise.
        dtype: the model's dtype when the edit was made.
        diagnostics: the solve's own report, if there was a solve.
    """

    component: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
    path: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,256}$")]
    layer: Annotated[int, Field(ge=0)]
    role: Role
    d_out: Annotated[int, Field(ge=1)]
    d_in: Annotated[int, Field(ge=1)]
    rank: Annotated[int, Field(ge=1)]
    relative_norm: float
    base_sha256: dict[str, Sha256]
    result_sha256: Sha256 | None
    achieved: float | None
    dtype: str
    diagnostics: dict[str, float] | None = None

    @property
    def site(self) -> EditSite:
        """The site as the rest of the package knows it."""
        return EditSite(self.component, self.path, self.layer, self.role, self.d_out, self.d_in)


class BaseRecord(_Frozen):
    """The model that the edit was made for."""

    source: str
    revision: str | None
    backend: str
    fingerprints: dict[str, Sha256]


class PluginRecord(_Frozen):
    """A locator or updater with its settings."""

    name: str
    reference: str
    settings: dict[str, Any]


class TensorRecord(_Frozen):
    """One tensor of the file."""

    dtype: str
    shape: tuple[int, ...]
    sha256: Sha256


class WantedRecord(_Frozen):
    """One request's rows in `pairs.safetensors`; see `diffedit.pairs.Wanted`."""

    rows: Annotated[int, Field(ge=0)]
    count: Annotated[int, Field(ge=0)]
    group: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class HeldRecord(WantedRecord):
    """One preserved name's rows; see `diffedit.pairs.Held`."""

    name: str


class PairsRecord(_Frozen):
    """How `pairs.safetensors` is laid out at one site.

    Attributes:
        wanted: per request, in the requests' order.
        held: per preserved name.
        weight_norm: Frobenius norm of the unedited weight, positive.
        metric: marks of the metric that the solve was made in (`linalg.metric`); empty without.
        tensors: the site's tensors, by name.
    """

    wanted: tuple[WantedRecord, ...]
    held: tuple[HeldRecord, ...]
    weight_norm: Annotated[float, Field(gt=0)]
    metric: tuple[float, ...] = Field(max_length=16)
    tensors: dict[str, TensorRecord]


class Manifest(_Frozen):
    """Everything about an edit but its numbers.

    Attributes:
        pairs: per site name, what `pairs.safetensors` holds; empty for edits without it.
        parents: ids of the edits that this one was composed, scaled or taken from, sorted.
    """

    format: str = FORMAT
    format_version: str = FORMAT_VERSION
    edit_id: str = ""
    requests: tuple[Request, ...]
    target_reasons: tuple[str, ...]
    tokens: TokenRule
    locator: PluginRecord
    updater: PluginRecord
    scores: tuple[float, ...] = ()
    sites: tuple[SiteRecord, ...]
    base: BaseRecord
    versions: dict[str, str]
    tensors: dict[str, TensorRecord]
    pairs: dict[str, PairsRecord] = {}
    parents: tuple[Sha256, ...] = ()

    @model_validator(mode="after")
    def _one_reason_each(self) -> Manifest:
        if not self.requests or len(self.target_reasons) != len(self.requests):
            raise ValueError(f"{len(self.requests)} requests with {len(self.target_reasons)} reasons")
        return self

    @property
    def location(self) -> Location:
        """The location as the locator returned it."""
        sites = tuple(record.site for record in self.sites)
        return Location(sites, self.tokens, self.locator.name, self.locator.reference, self.scores)

    def with_id(self) -> Manifest:
        """The same manifest with its `edit_id` computed.

        Raises:
            RequestError: a plugin's settings hold something that JSON cannot.
        """
        try:
            content = canonical_json(self.model_dump(mode="json", exclude={"edit_id"}))
        except (PydanticSerializationError, TypeError, ValueError) as error:
            raise RequestError("the settings cannot be written as JSON", cause=str(error)) from error
        return self.model_copy(update={"edit_id": hashlib.sha256(content).hexdigest()})

    def slug(self) -> str:
        """A folder name: action and subjects, lower case, at most 60 characters."""
        words = "-".join([self.requests[0].action, *(request.subject for request in self.requests)]).lower()
        return re.sub(r"[^a-z0-9]+", "-", words).strip("-")[:60].rstrip("-") or "edit"


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys, no white space, no NaN: one text per value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def diagnostics_dict(diagnostics: Diagnostics | TrainingDiagnostics | None) -> dict[str, float] | None:
    """Diagnostics as plain numbers for the manifest."""
    return None if diagnostics is None else {key: float(value) for key, value in vars(diagnostics).items()}
