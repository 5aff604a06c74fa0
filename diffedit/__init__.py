"""diffedit edits what a text-to-image model knows, in milliseconds, and ships the edit as a few kilobytes.

Not to be confused with DiffEdit, the image-editing method: this package changes a model's weights, not a picture.

    from diffedit import Editor

    edit = Editor("builtin:emoji").ablate("dog")
    edit.save()

The names below are loaded on first use: importing the package imports neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import Any

from diffedit._version import __version__

_PUBLIC = {
    "Activations": "diffedit.interfaces",
    "Backend": "diffedit.interfaces",
    "CausalTrace": "diffedit.tracing.result",
    "CausalTracing": "diffedit.locators.causal_trace",
    "Conflict": "diffedit.algebra",
    "Delta": "diffedit.delta",
    "Diagnostics": "diffedit.delta",
    "DiffEditError": "diffedit.errors",
    "Edit": "diffedit.edit",
    "EditSite": "diffedit.site",
    "Editor": "diffedit.editor",
    "Evaluation": "diffedit.evaluate.records",
    "FixedLocator": "diffedit.locators.fixed",
    "Ledger": "diffedit.ledger",
    "Location": "diffedit.site",
    "Locator": "diffedit.interfaces",
    "LowRank": "diffedit.delta",
    "Measure": "diffedit.traceable",
    "ModelDiff": "diffedit.audit.records",
    "Outcome": "diffedit.fleet",
    "Plan": "diffedit.plan",
    "QuickFix": "diffedit.updaters.closed_form",
    "QuickFixPublished": "diffedit.updaters.closed_form",
    "Request": "diffedit.request",
    "Role": "diffedit.site",
    "SubjectSpan": "diffedit.site",
    "TokenRule": "diffedit.site",
    "Traceable": "diffedit.traceable",
    "Updater": "diffedit.interfaces",
    "Verification": "diffedit.audit.verify",
    "apply_to_models": "diffedit.fleet",
    "compose": "diffedit.edit",
    "diff": "diffedit.audit.diff",
    "evaluate_edit": "diffedit.evaluate.run",
    "verify": "diffedit.audit.verify",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'diffedit' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
