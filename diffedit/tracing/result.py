"""A finished causal trace: the numbers, what they were made with, the files they are kept in, and the picture of them.

On disk a trace is a folder with `trace.json` (what was traced and how) and `trace.safetensors` (Phi of every run, in
float64). The statistics are not stored: they follow from the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from diffedit._version import __version__
from diffedit.errors import MalformedArtifactError, OutputExistsError, StorageError, UnsupportedVersionError
from diffedit.intervention import Part
from diffedit.io.folder import write_file
from diffedit.locators.table import Effect, TraceTable, Unit
from diffedit.site import EditSite, Location, Role, TokenRule
from diffedit.tracing.heatmap import draw

FORMAT = 1
JSON_NAME, TENSORS_NAME = "trace.json", "trace.safetensors"


@dataclass(frozen=True, eq=False)
class CausalTrace(TraceTable):
    """A trace table with its origin.

    Attributes:
        method: name of the locator.
        reference: its reference.
        settings: its fields.
        origin: model, revision, fingerprints, versions, noise, batch size.
    """

    method: str = ""
    reference: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    def best(self, effect: Effect | None = None, sites: int | None = None) -> Location:
        """Where to edit: the states with the largest effect among those that an edit can reach.

        Args:
            effect: the order of the states; default: the one that the trace was made with.
            sites: at most so many states; default: as many as the locator says.

        Raises:
            NoCausalSiteError: the corruption did not remove the concept, or no state's effect is certain.
        """
        rules = tuple(TokenRule(rule) for rule in self.settings.get("edit_tokens", tuple(TokenRule)))
        order, count = effect or self.settings.get("effect", "signed"), sites or self.settings.get("sites", 1)
        return self.locate(self.method, self.reference, order, rules, count)

    def plot(self, path: str | Path, effect: Effect | None = None) -> Path:
        """Draw the heat map: one panel per kind of part, layers from left to right, tokens from top to bottom.

        Args:
            path: a .png, .svg or .pdf file; replaced if it is there.
            effect: what to draw; default: the order that the trace was made with.

        Raises:
            UnsupportedModelError: matplotlib is not installed.
            StorageError: the file cannot be written.
        """
        return draw(self, Path(path), effect or self.settings.get("effect", "signed"))

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write both files into the folder `path`.

        Raises:
            OutputExistsError: a trace is there already.
            StorageError: the file system refused.
        """
        folder = Path(path).expanduser()
        if not overwrite:
            refuse_existing(folder)
        for name, data in self.files().items():
            write_file(folder / name, data, overwrite=True)
        return folder

    def files(self) -> dict[str, bytes]:
        """The files' content; the same trace gives the same bytes. The JSON comes last: it says that all is there."""
        tensors = {name: torch.from_numpy(getattr(self, name)) for name in ("clean", "corrupted", "restored")}
        return {
            TENSORS_NAME: save({name: value.contiguous() for name, value in tensors.items()}),
            JSON_NAME: (json.dumps({"format": FORMAT, **self.describe()}, indent=2) + "\n").encode(),
        }

    def describe(self) -> dict[str, Any]:
        """Everything but the runs' numbers, as plain JSON."""
        return {
            "component": self.component,
            "method": self.method,
            "reference": self.reference,
            "settings": dict(self.settings),
            "origin": dict(self.origin),
            "window": self.window,
            "least_total_effect": self.least_total_effect,
            "columns": list(self.columns),
            "units": [asdict(unit) for unit in self.units],
            "parts": [asdict(part) for part in self.parts],
        }

    @classmethod
    def load(cls, path: str | Path) -> CausalTrace:
        """Read a trace from its folder.

        Raises:
            StorageError: the files cannot be read.
            MalformedArtifactError: they are no trace.
            UnsupportedVersionError: a later diffedit wrote them.
        """
        folder = Path(path).expanduser()
        try:
            text, data = (folder / JSON_NAME).read_bytes(), (folder / TENSORS_NAME).read_bytes()
        except OSError as error:
            raise StorageError(
                "the trace cannot be read", value=repr(str(folder)), cause=str(error), hint="name its folder"
            ) from error
        try:
            content = json.loads(text)
            if content["format"] > FORMAT:
                hint = "upgrade diffedit"
                raise UnsupportedVersionError("the trace has a later format", value=content["format"], hint=hint)
            numbers = {name: value.numpy() for name, value in load(data).items()}
            parts = tuple(_part(record) for record in content["parts"])
            units = tuple(Unit(**record) for record in content["units"])
            plain = {key: content[key] for key in ("component", "method", "reference", "settings", "origin", "window")}
            trace = cls(
                parts=parts,
                units=units,
                columns=tuple(content["columns"]),
                least_total_effect=float(content["least_total_effect"]),
                **plain,
                **numbers,
            )
            shape = (len(units), len(parts), len(trace.columns))
            fits = trace.restored.shape == shape and trace.clean.shape == trace.corrupted.shape == shape[:1]
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            cause = f"{type(error).__name__}: {error}"
            raise MalformedArtifactError("this is no causal trace", value=repr(str(folder)), cause=cause) from error
        if not fits or trace.restored.dtype != "float64":
            raise MalformedArtifactError("the trace's numbers do not fit its description", value=repr(str(folder)))
        return trace


def refuse_existing(folder: Path) -> None:
    """Raise `OutputExistsError` if a finished trace is in the folder."""
    if (folder / JSON_NAME).exists():
        hint = "choose another folder, or allow overwriting"
        raise OutputExistsError("a trace is already there", value=repr(str(folder)), hint=hint)


def finished(table: TraceTable, method: str, reference: str, settings: Any, origin: Mapping[str, Any]) -> CausalTrace:
    """A table with its origin; both are kept as plain JSON, so that what is loaded equals what was saved."""
    numbers = {item.name: getattr(table, item.name) for item in fields(TraceTable)}
    plain = json.loads(json.dumps({"settings": settings, "origin": {"diffedit": __version__, **origin}}))
    return CausalTrace(**numbers, method=method, reference=reference, **plain)


def _part(record: Mapping[str, Any]) -> Part:
    sites = tuple(EditSite(**{**site, "role": Role(site["role"])}) for site in record["sites"])
    return Part(**{**record, "sites": sites})
