"""From whatever names a model to its backend, and from what the user said to requests at a location.

Everything that comes before the solve, in one place, because an edit and the plan of an edit start the same way; and
what is checked before pictures are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffedit import registry
from diffedit.aliases import Expand
from diffedit.backends.loading import load_model
from diffedit.errors import RequestError, UnsupportedModelError
from diffedit.garbage import postponed
from diffedit.interfaces import Backend, Locator, Sampling, Updater
from diffedit.request import Action, Request, edited_names
from diffedit.site import Location, Role
from diffedit.targets import Completer

CROWDED = 8  # inputs of a layer per edited name


@dataclass(frozen=True)
class Prepared:
    """What a solve starts from.

    Attributes:
        requests: with every target filled in.
        reasons: per request, why that target.
        location: where to edit.
        locator: what found it.
        updater: what will solve.
    """

    requests: tuple[Request, ...]
    reasons: tuple[str, ...]
    location: Location
    locator: Locator
    updater: Updater

    @property
    def notes(self) -> tuple[str, ...]:
        """A note if one layer is to hold more names than it has room for, with what has more room.

        On builtin:emoji a layer with 128 inputs kept the others with 12 objects edited at once, lost some with 25, and
        half of them with 50; the MLPs of all layers held 50.
        """
        names, layers = len(edited_names(self.requests)), {site.layer for site in self.location.sites}
        room = min(site.d_in for site in self.location.sites)
        if len(layers) > 1 or names * CROWDED <= room:
            return ()
        note = f"{names} names are many for one layer with {room} inputs: others may change, so measure them"
        if Role.TEXT_MLP_OUT in self.updater.roles:
            note += "; the locator text-mlp-range with stop=1 has more room, and takes longer"
        return (note,)


def choose_backend(model: Any, backend: str | None, **loading: Any) -> Backend:
    """The one backend that accepts the model.

    Args:
        model: see `load_model`.
        backend: name of the family, or `None` for the one that recognises the model.
        loading: further arguments of `load_model`.

    Raises:
        UnsupportedModelError: no backend accepts it, or several do.
        DiffEditError: there is no such model or backend, or it cannot be loaded.
    """
    classes = registry.backends() if backend is None else (registry.get("backends", backend),)
    loaded = load_model(model, **loading)
    accepting = [cls for cls in classes if cls.accepts(loaded.pipeline)]
    if len(accepting) != 1:
        tried = ", ".join(cls.name for cls in classes)
        raise UnsupportedModelError(
            "no backend accepts the model" if not accepting else "several backends accept the model",
            value=f"{type(loaded.pipeline).__name__} from {loaded.source!r}; tried {tried}",
            hint="choose one with backend=" if accepting else "see `diffedit list`; a plugin can add a family",
        )
    chosen: Backend = accepting[0](loaded)
    return chosen


@postponed()
def make_requests(
    completer: Completer, action: Action, subject: Any, updater: str | Updater, *, expand: Expand = "none", **said: Any
) -> tuple[list[Request], Updater, list[str]]:
    """Requests for one subject or several in one solve, the updater that they are for, and notes about other names.

    Args:
        completer: of the model.
        action: what to do.
        subject: a name or a list of them.
        updater: name or object.
        expand: which other names of each subject to add, see `diffedit.aliases`.
        said: `target`, `kind`, `preserve`, `aliases`, `templates` and `seed` as the user gave them.

    Raises:
        RequestError: no subject, aliases of several subjects, or a request that makes no sense.
        UnknownNameError: no such updater.
    """
    subjects: list[Any] = list(subject) if isinstance(subject, list | tuple) else [subject]
    if not subjects:
        raise RequestError("there is no subject", value="[]", hint="name at least one")
    if said["aliases"] and len(subjects) > 1:
        raise RequestError("aliases belong to one subject", value=subjects, hint="list them as subjects")
    change: Updater = registry.build("updaters", updater)
    listed = said["preserve"] is not None
    said |= {"together": subjects, "preserves": change.preserves}
    requests, notes = completer.widen([completer.request(name, action, **said) for name in subjects], expand, listed)
    return requests, change, notes


def choose_plugins(
    requests: Sequence[Request], updater: str | Updater, locator: str | Locator | None
) -> tuple[Updater, Locator]:
    """The updater and the locator, after a look whether the requests can go into one solve.

    Raises:
        RequestError: there is no request, or a subject is given twice.
        UnknownNameError: no such updater or locator.
    """
    if not requests:
        raise RequestError("there is nothing to edit", value="0 requests", hint="give at least one request")
    subjects = [name for request in requests for name in {name.casefold() for name in request.names}]
    if len(set(subjects)) < len(subjects):
        twice = sorted({name for name in subjects if subjects.count(name) > 1})
        raise RequestError("a subject is given twice", value=", ".join(twice), hint="name each once")
    change: Updater = registry.build("updaters", updater)
    find: Locator = registry.build("locators", change.locator if locator is None else locator)
    return change, find


def prepare(
    backend: Backend, completer: Completer, requests: Sequence[Request], updater: Updater, locator: Locator
) -> Prepared:
    """Choose missing targets and find the sites; the model's weights must be the unedited ones.

    Raises:
        UnsupportedModelError: the updater cannot edit what the locator found.
        DiffEditError: no target is left, or the locator finds no site.
    """
    filled, reasons = completer.fill(requests)
    location = locator.locate(backend, filled)
    wrong = [site.name for site in location.sites if site.role not in updater.roles]
    if wrong:
        raise UnsupportedModelError(f"the updater {updater.name} cannot edit these sites", value=", ".join(wrong))
    return Prepared(tuple(filled), tuple(reasons), location, locator, updater)


def pair_up(prompts: Any, seeds: Any) -> list[tuple[Any, Any]]:
    """Every prompt with every seed, prompt by prompt.

    Raises:
        RequestError: neither one nor a list.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    numbers = [seeds] if isinstance(seeds, int) else seeds
    if not isinstance(texts, Sequence) or not isinstance(numbers, Sequence):
        given = f"{type(prompts).__name__} and {type(seeds).__name__}"
        raise RequestError("prompts and seeds are each one or a list", value=given)
    return [(text, number) for text in texts for number in numbers]


def choose_sampling(
    default: Sampling, pairs: Sequence[tuple[Any, Any]], steps: int | None, guidance: float | None, batch_size: int
) -> dict[str, Any]:
    """How to draw the pairs, as arguments of `Backend.generate`; what is `None` is as the model likes it.

    Raises:
        RequestError: they cannot be drawn so.
    """
    steps = default.steps if steps is None else steps
    guidance = default.guidance if guidance is None else guidance
    for text, number in pairs:
        _check(text, str, "a prompt is text")
        _check(number, int, "a seed is a whole number")
    for value in (steps, batch_size):
        _check(value, int, "steps and batch size are whole numbers of at least 1", least=1)
    return {"steps": steps, "guidance": guidance, "batch_size": batch_size}


def _check(value: Any, kind: type, rule: str, least: int = 0) -> None:
    fits = isinstance(value, kind)
    if not fits or (least and value < least):
        raise RequestError(rule, value=repr(value))
