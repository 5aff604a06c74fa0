"""The story in one screen: request -> locate -> solve -> write.

    Editor("builtin:emoji").ablate("dog").save()

An edit is always solved against the unedited weights, so that it loads on a pristine model anywhere and the order
of edits does not matter; several edits in one model add up. Subjects given together are solved together, which
keeps them from disturbing each other: prefer one `ablate([...])` to many.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffedit import registry
from diffedit.aliases import Expand
from diffedit.backends.deferred import complete
from diffedit.edit import Edit
from diffedit.errors import NotAppliedError
from diffedit.interfaces import Backend, Locator, Updater, Vocabulary
from diffedit.ledger import Ledger, Trial
from diffedit.plan import Plan
from diffedit.planning import make_plan
from diffedit.preparing import choose_backend, choose_plugins, choose_sampling, make_requests, pair_up, prepare
from diffedit.provenance import check_base, describe
from diffedit.request import Action, Kind, Request
from diffedit.site import EditSite
from diffedit.targets import Completer
from diffedit.tracing.result import CausalTrace
from diffedit.tracing.run import trace

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


class Editor:
    """Edits what one text-to-image model knows.

    Args:
        model: a `StableDiffusionPipeline`, `"builtin:emoji"`, a pipeline folder, a Hub id or a single-file
            `.safetensors` checkpoint. Of files only what an edit needs is read; UNet and VAE follow when needed.
        backend: name of the model family; default: the one that recognises the model.
        device: where to put the model; default: where it is.
        dtype: dtype to load it in; default float32, which keeps small edits. A pipeline object keeps its own.
        revision: branch, tag or commit of a Hub id.
        token: Hub token.
        config: for a single-file checkpoint, a folder or Hub id with its configs and tokenizer.
        variant: of a folder or Hub id: "fp16" takes `model.fp16.safetensors` for the parts that have such a file.

    Raises:
        DiffEditError: no such model, no backend for it, a pickle, an unknown name.
    """

    def __init__(
        self,
        model: Any,
        *,
        backend: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | None = None,
        config: str | None = None,
        variant: str | None = None,
    ) -> None:
        named: dict[str, Any] = {"revision": revision, "token": token, "config": config, "variant": variant}
        self.backend: Backend = choose_backend(model, backend, device=device, dtype=dtype, **named)
        self.ledger = Ledger(self.backend)
        self._edits: dict[str, Edit] = {}
        self._complete = Completer(self.backend)

    @property
    def pipeline(self) -> Any:
        """The live pipeline, whole; its weights carry the active edits. UNet and VAE are read now if they were not."""
        return complete(self.backend.model.pipeline)

    @property
    def vocabulary(self) -> Vocabulary:
        """What the model is known to know; empty for most models."""
        return self.backend.model.vocabulary

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits in the model, in the order they were applied."""
        return tuple(self._edits[key] for key in self.ledger.active)

    def ablate(
        self,
        subject: str | Sequence[str],
        *,
        target: str | None = None,
        kind: Kind | None = None,
        updater: str | Updater = "quickfix",
        locator: str | Locator | None = None,
        preserve: Sequence[str] | None = None,
        aliases: Sequence[str] = (),
        expand: Expand = "none",
        templates: Sequence[str] = (),
        seed: int = 0,
    ) -> Edit:
        """Suppress one concept, or several in one solve.

        Args:
            subject: a name as it stands in prompts, or a list of them.
            target: what takes its place; default: chosen automatically, logged, and recorded in the edit.
            kind: "object" or "style"; default: a style if the model's vocabulary lists it or the subject says so.
            updater: name or object.
            locator: name or object; default: the one that the updater is made for.
            preserve: concepts whose outputs must stay; default: all others that the model's vocabulary lists, if it has
                one. An empty list preserves nothing.
            aliases: other names of the subject (one subject only).
            expand: other names to find by rule for each subject: "forms" (plural, hyphens, ...) or "all", with
                misspellings; see `diffedit.aliases`. `Edit.summary` lists them, `Edit.notes` what was left out.
            templates: prompts around the subject, with one "{}" each; default: a broad set.
            seed: for updaters and locators that draw random numbers.

        Returns:
            The edit, already in the model.
        """
        said: Any = {"target": target, "kind": kind, "preserve": preserve, "aliases": aliases, "templates": templates}
        return self._make("ablate", subject, updater, locator, **said, expand=expand, seed=seed)

    def update(
        self,
        subject: str,
        target: str,
        *,
        kind: Kind | None = None,
        updater: str | Updater = "quickfix",
        locator: str | Locator | None = None,
        preserve: Sequence[str] | None = None,
        aliases: Sequence[str] = (),
        expand: Expand = "none",
        templates: Sequence[str] = (),
        seed: int = 0,
    ) -> Edit:
        """Give a concept another meaning ("flag of X" -> "flag of Y"); arguments as for `ablate`."""
        said: Any = {"target": target, "kind": kind, "preserve": preserve, "aliases": aliases, "templates": templates}
        return self._make("update", [subject], updater, locator, **said, expand=expand, seed=seed)

    def plan(
        self,
        subject: str | Sequence[str],
        *,
        target: str | None = None,
        kind: Kind | None = None,
        updater: str | Updater = "quickfix",
        locator: str | Locator | None = None,
        preserve: Sequence[str] | None = None,
        aliases: Sequence[str] = (),
        expand: Expand = "none",
        templates: Sequence[str] = (),
        seed: int = 0,
    ) -> Plan:
        """What `ablate` with the same arguments would do and cost: sites, ranks, bytes, time and memory.

        Changes nothing. The estimates come from doing a small part of the work (see `diffedit.planning`); an `update`
        costs what an `ablate` of the same subject does.

        Raises:
            RequestError: the locator has to measure before its sites are known.
            DiffEditError: what `ablate` would raise, as far as the part that is done shows it.
        """
        said: Any = {"target": target, "kind": kind, "preserve": preserve, "aliases": aliases, "templates": templates}
        said |= {"expand": expand, "seed": seed}
        requests, change, notes = make_requests(self._complete, "ablate", subject, updater, **said)
        chosen = choose_plugins(requests, change, locator)
        plan = make_plan(self.backend, self.ledger, self._complete, requests, *chosen)
        return plan.model_copy(update={"notes": (*plan.notes, *notes)})

    def run(
        self, requests: Sequence[Request], *, updater: str | Updater = "quickfix", locator: str | Locator | None = None
    ) -> Edit:
        """Carry out requests in one solve."""
        change, find = choose_plugins(requests, updater, locator)
        with self.ledger.unedited():
            ready = prepare(self.backend, self._complete, requests, change, find)
            delta = change.solve(self.backend, ready.requests, ready.location)
        trial = self.ledger.trial(delta)
        manifest = describe(self.backend, self.ledger, ready, delta, trial)
        return self._apply(Edit(manifest, delta, notes=ready.notes), trial)

    def trace(
        self,
        prompt: str | Sequence[str],
        subject: str,
        *,
        out: str | Path | None = None,
        overwrite: bool = False,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> CausalTrace:
        """Measure where the model keeps the subject: a causal trace of the live model, active edits included.

        Args:
            prompt: one or several prompts with the subject in them; effects are averaged over them.
            subject: the text whose embeddings are disturbed.
            out: folder for the result; an interrupted trace with the same `out` goes on where it stopped.
            overwrite: replace a finished trace in `out`.
            seed: the first of the seeds.
            progress: called with (runs done, runs in all).
            settings: fields of `CausalTracing`, such as component="unet", measure="image", seeds=5.
        """
        find = registry.configure("locators", "causal-trace", settings)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        probes = [(text, subject) for text in prompts]
        return trace(self.backend, find, probes, seed=seed, out=out, overwrite=overwrite, progress=progress)

    def load(self, edit: Edit | str | Path, *, revision: str | None = None, token: str | None = None) -> Edit:
        """Apply an edit to this model.

        Args:
            edit: an edit, its folder, or "user/name" on the Hub.
            revision: branch, tag or commit on the Hub.
            token: Hub token.

        Raises:
            HubError: it cannot be had from the Hub.
            ArtifactError: what is there is not an edit, or damaged.
            BaseMismatchError: it was made for another base model.
            AlreadyAppliedError: it is in the model already.
        """
        if not isinstance(edit, Edit):
            known = isinstance(edit, str | os.PathLike)
            edit = Edit.from_pretrained(edit, revision=revision, token=token) if known else Edit.load(edit)
        elif edit.applied and edit.id not in self.ledger.active:
            edit = edit.copy()
        check_base(edit.manifest, self.backend, self.ledger)
        return self._apply(edit)

    def revert(self, edit: Edit | None = None) -> None:
        """Take one edit out of the model, or all of them; the weights then are the original bits again."""
        if edit is not None and edit.id not in self.ledger.active:
            raise NotAppliedError("the edit is not in this model", value=repr(edit), hint="see editor.edits")
        for key in [edit.id] if edit is not None else reversed(self.ledger.active):
            self.ledger.revert(key)
            self._edits.pop(key, None)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 16,
    ) -> list[Image]:
        """Pictures of every prompt with every seed, prompt by prompt.

        Args:
            prompts: one or several.
            seeds: one or several; the same prompt and seed give the same picture before and after an edit.
            steps: denoising steps; default: the model's own.
            guidance: classifier-free guidance scale; default: the model's own.
            batch_size: pictures sampled together; costs memory, saves time.
        """
        pairs = pair_up(prompts, seeds)
        return self.generate_pairs(pairs, steps=steps, guidance=guidance, batch_size=batch_size)

    def generate_pairs(
        self,
        pairs: Sequence[tuple[str, int]],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 16,
    ) -> list[Image]:
        """One picture per (prompt, seed) pair; arguments as for `generate`."""
        chosen = choose_sampling(self.backend.model.sampling, pairs, steps, guidance, batch_size)
        return self.backend.generate(pairs, **chosen)

    def save_pipeline(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the whole model with its active edits merged in, as a folder that stock diffusers loads.

        A model that came from a single `.safetensors` file can also be written as a new one: name `path` so.

        Raises:
            OutputExistsError: something is there already.
            StorageError: the file system refused; nothing is left behind.
        """
        return self.backend.save(Path(path).expanduser(), overwrite=overwrite)

    def _make(
        self, action: Action, subject: Any, updater: str | Updater, locator: str | Locator | None, **said: Any
    ) -> Edit:
        requests, change, notes = make_requests(self._complete, action, subject, updater, **said)
        edit = self.run(requests, updater=change, locator=locator)
        edit.notes = (*notes, *edit.notes)
        return edit

    def _apply(self, edit: Edit, trial: Mapping[EditSite, Trial] | None = None) -> Edit:
        if edit.id not in self.ledger.active:
            self._edits[edit.id] = edit  # first: whatever the ledger holds can then be listed
        edit.bind(self.ledger)
        self.ledger.apply(edit.id, edit.delta, trial)
        return edit
