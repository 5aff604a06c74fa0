"""The methods, and for each the small grid that its main setting is tuned over. One method more is one entry more.

The first entry of a grid is the method's default. The grids are equally small (three entries), and all are searched on
the same concepts with the same number of pictures; see `concepts.TUNING`. A grid varies what its authors vary, or what
the method's page in the documentation found to matter on this model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffedit import registry
from diffedit.interfaces import Locator, Updater

LOCATOR = "locator"
Setting = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        updater: its registered name.
        grid: settings, the default first; the key `locator` holds the locator's name and fields.
        preserve: whether the other concepts are given to it (if it takes any).
        many: whether it solves for several concepts at once.
        seconds: about what an edit by default takes on one idle core, for the plan.
        brief: settings that lower the work and not the memory, for the measurement of memory.
        part: what it is about `quickfix` that this one leaves out or adds; empty for a method in its own right.
    """

    updater: str
    grid: Sequence[Setting] = ({},)
    preserve: bool = True
    many: bool = True
    seconds: float = 1.0
    brief: Setting = field(default_factory=dict)
    part: str = ""

    @property
    def slow(self) -> bool:
        """Whether it is measured on fewer concepts unless told otherwise."""
        return self.seconds > 10

    def build(self, setting: Setting, **more: Any) -> tuple[Updater, Locator | None]:
        """The updater, and its locator if the setting names one."""
        fields = {key: value for key, value in setting.items() if key != LOCATOR}
        updater: Updater = registry.configure("updaters", self.updater, {**fields, **more})
        named = setting.get(LOCATOR)
        if named is None:
            return updater, None
        rest = {key: value for key, value in named.items() if key != "name"}
        locator: Locator = registry.configure("locators", named["name"], rest)
        return updater, locator


_TRAINING: Setting = {"steps": 3, "evaluations": 1}
_EARLY: Setting = {"name": "text-mlp", "layer": 0}

_PAPER: Setting = {"everyday": 0, "give_up": None}  # lam alone, as in the paper's equation

METHODS: dict[str, Method] = {
    "quickfix": Method("quickfix", ({}, {"give_up": 0.05}, {"give_up": 0.3})),
    "quickfix-bare": Method("quickfix", ({}, {"give_up": 0.05}, {"give_up": 0.3}), preserve=False),
    "quickfix-spread": Method("quickfix", ({LOCATOR: {"name": "text-mlp-range", "stop": 1.0}},), seconds=6),
    "quickfix-paper": Method("quickfix", tuple({**_PAPER, "lam": lam} for lam in (0.01, 0.001, 0.1)), preserve=False),
    "quickfix-published": Method("quickfix-published", ({}, {"lam": 0.1}, {"lam": 1.0})),
    "uce": Method("uce", ({}, {"lam": 0.05}, {"pairing": "every"})),
    "time": Method("time", ({}, {"lam": 1.0}, {"lam": 10.0})),
    "locoedit": Method("locoedit", ({}, {"lam": 0.001}, {"pairing": "every"}), many=False, seconds=5),
    "refact": Method(
        "refact",
        ({}, {LOCATOR: _EARLY}, {LOCATOR: _EARLY, "learning_rate": 0.2}),
        seconds=6,
        brief={"steps": 3},
    ),
    "emcid": Method("emcid", ({}, {"moment_weight": 400.0}, {"moment_weight": 40.0}), seconds=50, brief={"steps": 3}),
    "esd": Method(
        "esd",
        ({}, {"learning_rate": 2e-4, "steps": 60}, {"learning_rate": 5e-4, "steps": 60}),
        many=False,
        seconds=140,
        brief=_TRAINING,
    ),
    "esd-u": Method(
        "esd-u",
        ({}, {"learning_rate": 2e-4, "steps": 60}, {"learning_rate": 5e-4, "steps": 60}),
        many=False,
        seconds=150,
        brief=_TRAINING,
    ),
    "concept-ablation": Method(
        "concept-ablation",
        ({}, {"learning_rate": 1e-4, "steps": 100}, {"learning_rate": 2e-4, "steps": 100, "teacher": "original"}),
        many=False,
        seconds=50,
        brief=_TRAINING,
    ),
    "finetune-text-encoder": Method(
        "finetune-text-encoder",
        ({}, {"learning_rate": 3e-5}, {"learning_rate": 3e-4}),
        many=False,
        seconds=20,
        brief=_TRAINING,
    ),
    # What `quickfix` is made of, a part at a time; the grids have one entry, so there is nothing to tune.
    "quickfix-fixed-lam": Method("quickfix", ({"give_up": None},), part="lam and everyday_weight as they stand"),
    "quickfix-no-everyday": Method("quickfix", ({"everyday": 0},), part="without everyday captions"),
    "quickfix-named-only": Method("quickfix", (_PAPER,), part="without both: named concepts are held, by lam alone"),
    "quickfix-exact": Method("quickfix", ({"exact": "empty"},), part="the empty prompt moves by nothing at all"),
    "quickfix-mlp": Method("quickfix", ({LOCATOR: _EARLY},), part="edits the first layer's MLP instead"),
    "quickfix-traced": Method(
        "quickfix",
        ({LOCATOR: {"name": "causal-trace", "measure": "embedding", "sites": 2}},),
        part="edits up to two sites that a causal trace finds",
        seconds=4,
    ),
}
REFERENCE, CROWD = "quickfix", "quickfix-spread"  # and how it is meant to be used for many concepts at once


def available(names: Sequence[str] = ()) -> dict[str, Method]:
    """The methods of those names whose updaters this installation has; all of them if no name is given."""
    known = registry.names("updaters")
    return {name: METHODS[name] for name in (names or METHODS) if METHODS[name].updater in known}


def describe(setting: Setting) -> str:
    """A setting as it stands in a table.

    >>> describe({"lam": 0.1, "locator": {"name": "text-mlp", "layer": 0}})
    'lam=0.1, locator text-mlp layer=0'
    """
    parts = [f"{key}={value}" for key, value in setting.items() if key != LOCATOR]
    if LOCATOR in setting:
        fields = " ".join(f"{key}={value}" for key, value in setting[LOCATOR].items() if key != "name")
        parts.append(f"locator {setting[LOCATOR]['name']} {fields}".rstrip())
    return ", ".join(parts) or "default"
