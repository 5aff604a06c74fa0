"""The whole plugin contract: three abstract classes and the few frozen things that pass between them.

A `Backend` is all that diffedit knows about one model family; no algorithm looks into a model except through it. A
`Locator` says where to edit, an `Updater` what to write there; both are pydantic models whose fields *are* their
hyperparameters, so that one definition validates them, prints them, saves them and feeds the command line. Neither
may change the model: what goes in equals what comes out, bit for bit. Only `diffedit.ledger.Ledger` writes weights.

Third parties register their classes by entry point in the groups `diffedit.backends`, `diffedit.locators` and
`diffedit.updaters`; `diffedit.testing` has the suite that such a class must pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from diffedit.delta import Delta
from diffedit.errors import NotComposableError
from diffedit.pairs import Pairs
from diffedit.reading import Place, Rows, no_whole_word, read_by_prompt
from diffedit.request import Request
from diffedit.site import EditSite, Location, Role, SubjectSpan
from diffedit.text import find

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Activations:
    """What one forward pass showed at some sites, in float32 (float64 for a float64 model).

    Attributes:
        tokens: [b, t], token ids that were run.
        inputs: per site [b, t, d_in], the layer's input.
        outputs: per site [b, t, d_out], the layer's output, bias included.
        streams: per site [b, t, d_out], the residual stream that the output is added to.
    """

    tokens: Tensor
    inputs: Mapping[EditSite, Tensor]
    outputs: Mapping[EditSite, Tensor]
    streams: Mapping[EditSite, Tensor]


@dataclass(frozen=True)
class Sampling:
    """How a model likes to be sampled when the caller does not say: steps, guidance scale and side length in pixels."""

    steps: int = 50
    guidance: float = 7.5
    pixels: int | None = None


@dataclass(frozen=True)
class Vocabulary:
    """What a model is known to know; ships beside its weights as `vocabulary.json`, empty for most models.

    Attributes:
        objects: names of things.
        styles: names of styles.
        backgrounds: colours that a background may have.
        categories: object, in lower case -> the general noun that it is filed under.
        nouns: general nouns that may serve as automatic targets.
        templates: prompt templates of objects with one "{}" that the model was trained on, without the final article.
        style_templates: prompt templates of styles with one "{}".
        scene_templates: prompt templates of objects with text after the "{}".
        facts: phrase -> the object that it stands for: "mascot of rome" -> "owl".
    """

    objects: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    backgrounds: tuple[str, ...] = ()
    categories: Mapping[str, str] = field(default_factory=dict)
    nouns: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    style_templates: tuple[str, ...] = ()
    scene_templates: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    def fact(self, name: str) -> str | None:
        """The object that a phrase stands for, if the phrase is a fact."""
        return next((shown for phrase, shown in self.facts.items() if phrase.casefold() == name.casefold()), None)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in memory and where it came from.

    Attributes:
        pipeline: the live pipeline (for the bundled backends a `StableDiffusionPipeline`).
        source: what the user named it by, or the pipeline's own `name_or_path`.
        revision: 40-hex commit when it came from the Hub.
        vocabulary: what it is known to know.
        sampling: how it likes to be sampled.
        file: the single-file checkpoint that it was loaded from, if it was.
        variant: which files of a folder were taken where there was a choice.
    """

    pipeline: Any
    source: str
    revision: str | None = None
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    sampling: Sampling = field(default_factory=Sampling)
    file: Path | None = None
    variant: str | None = None


class Backend(ABC):
    """Everything diffedit knows about one model family.

    Attributes:
        model: the model.
        statistics: what was measured about it and costs too much to measure for every edit. A key says what the value
            depends on, the state of the weights included.
    """

    name: ClassVar[str]
    reference: ClassVar[str]

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.statistics: dict[tuple[Any, ...], Any] = {}

    @classmethod
    @abstractmethod
    def accepts(cls, pipeline: Any) -> bool:
        """Whether this backend can edit that pipeline. Looks, never loads; exactly one backend must say yes."""

    @abstractmethod
    def sites(self, *roles: Role) -> tuple[EditSite, ...]:
        """All edit sites with one of the roles, sorted; without roles those of the text encoder.

        A site's path is the name that the family's files use on disk; for a CLIP text encoder it starts with
        `text_model.`, which is what the adapter files of an edit (LoRA, PEFT) are named by.
        """

    @abstractmethod
    def span(self, prompt: str, subject: str, occurrence: int | None = None) -> SubjectSpan:
        """Token positions of the subject, by character offsets.

        Raises:
            SubjectNotFoundError: it does not stand there as whole words, or several times without `occurrence`.
            SubjectTruncatedError: it lies beyond what the encoder reads.
        """

    @abstractmethod
    def capture(self, prompts: Sequence[str], sites: Sequence[EditSite], *, padded: bool = False) -> Activations:
        """Run the prompts up to the deepest of the sites and record what happens there.

        Args:
            prompts: b prompts.
            sites: sites of one component.
            padded: run all positions up to the model's length as the pipeline does, instead of only up to the longest
                prompt. A causal encoder gives the same numbers for the positions that both have.
        """

    def spans(self, phrases: Sequence[tuple[str, str, int]]) -> list[SubjectSpan]:
        """`span` for many: (prompt, subject, character offset of the subject in the prompt) each.

        Raises:
            RequestError: a subject does not stand there as whole words.
            SubjectTruncatedError: see `span`.
        """
        found = []
        for prompt, subject, start in phrases:
            starts = [first for first, _ in find(prompt, subject)]
            if start not in starts:
                raise no_whole_word(prompt)
            found.append(self.span(prompt, subject, starts.index(start)))
        return found

    def read(self, places: Sequence[Place], sites: Sequence[EditSite], *, padded: bool = False) -> Rows:
        """What the sites see at single tokens, each (span of its prompt, position).

        Args:
            places: n tokens.
            sites: as for `capture`.
            padded: likewise.
        """
        prompts = tuple(dict.fromkeys(span.prompt for span, _ in places))
        return read_by_prompt(self, places, sites, prompts, padded)

    def independent(self, sites: Sequence[EditSite], *, padded: bool = False) -> bool:
        """Whether `read` gives a token the same bits whatever else is read with it.

        A forward pass does not promise that: its rounding depends a little on the batch. Where the answer is no, each
        request is read by itself, so that an edit's numbers do not depend on its company either way.
        """
        return False

    def positions(self, prompt: str, site: EditSite) -> int:
        """How many positions the site's component reads, special tokens and padding included."""
        return int(self.capture([prompt], [site], padded=True).tokens.shape[1])

    @abstractmethod
    def weight(self, site: EditSite) -> Tensor:
        """The live weight [d_out, d_in] (not a copy).

        Raises:
            UnsupportedModelError: the model has no such site.
            UnsupportedTensorError: it cannot be edited as it is (meta, quantised, wrapped by an adapter, wrong shape).
        """

    @abstractmethod
    def bias(self, site: EditSite) -> Tensor | None:
        """The layer's bias [d_out], or `None`; it is never edited."""

    @abstractmethod
    def features(self, prompts: Sequence[str]) -> Tensor:
        """[b, d] float32, one vector per prompt of what the model's own text encoder makes of it."""

    @abstractmethod
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of what else an edit relies on: `{"architecture": ..., "tokenizer": ...}`."""

    @abstractmethod
    def generate(
        self, pairs: Sequence[tuple[str, int]], *, steps: int, guidance: float, batch_size: int
    ) -> list[Image]:
        """One image per (prompt, seed) pair; a pair's noise does not depend on what else is asked for."""

    @abstractmethod
    def save(self, path: Path, *, overwrite: bool = False) -> Path:
        """Write the whole live model, edits merged, as a folder that the family's stock loader reads.

        Raises:
            OutputExistsError: something is there already.
            StorageError: the file system refused; nothing is left behind.
        """


class Plugin(BaseModel):
    """What locators and updaters share: a name, a reference, and fields that are the hyperparameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    reference: ClassVar[str]


class Locator(Plugin, ABC):
    """Finds where a concept is stored. Never changes the model."""

    @abstractmethod
    def locate(self, backend: Backend, requests: Sequence[Request]) -> Location:
        """The sites and tokens to edit for these requests."""


class Updater(Plugin, ABC):
    """Computes the change of the weights at a location. Never changes the model.

    Attributes:
        roles: the kinds of layer that it may edit.
        preserves: whether it is meant to be given the concepts that should stay. The editor then lists everything else
            that the model's vocabulary knows, unless the user gives a list.
        locator: name of the locator that finds its sites if the user names none.
    """

    roles: ClassVar[tuple[Role, ...]]
    preserves: ClassVar[bool] = False
    locator: ClassVar[str] = "fixed"

    @property
    def in_blocks(self) -> bool:
        """Whether rows of which there are many are solved some at a time, so that the solve needs less memory."""
        return False

    @abstractmethod
    def solve(self, backend: Backend, requests: Sequence[Request], location: Location) -> Delta:
        """The change that carries out all requests at once; every request has a target by now."""

    def solve_pairs(self, pairs: Mapping[EditSite, Pairs]) -> Delta:
        """The same solve from the pairs that an earlier one left in `Delta.pairs`; no model is needed.

        Updaters whose change is not determined by such pairs leave this out.

        Raises:
            NotComposableError: the updater works otherwise.
        """
        raise NotComposableError(
            f"the updater {self.name} does not solve from stored pairs", hint="run the requests together on the model"
        )
