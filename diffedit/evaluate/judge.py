"""What an evaluation needs of a judge, and how the judge recognises things.

A detector is a set of names with captions. A picture shows the name whose captions fit best on average (cosine with
the normalised mean of their unit vectors), as in zero-shot CLIP (Radford et al. 2021, arXiv 2103.00020). It always
names something, so it must first be shown to see what the unedited model draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from diffedit.bundled import PREFIX
from diffedit.errors import RequestError
from diffedit.evaluate.metrics import Array
from diffedit.evaluate.scorer import OBJECT_CAPTIONS, Scorer
from diffedit.request import Kind
from diffedit.text import with_article

if TYPE_CHECKING:
    from PIL.Image import Image

STYLE_CAPTIONS = ("a picture in the style of {}", "in the style of {}", "{} style")


@runtime_checkable
class Judge(Protocol):
    """A picture judge; `Scorer` is one, and anything else with these four will do.

    Attributes:
        name: what the report calls it.
    """

    name: str

    def digest(self) -> str:
        """Hex digest that changes when the judge does."""

    def embed_images(self, images: Sequence[Image]) -> Tensor:
        """[n, d] unit vectors, one per picture."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """[n, d] unit vectors, one per caption."""


def open_judge(scorer: str | Judge | None, source: str) -> Judge:
    """The judge of a name, or the one given.

    Args:
        scorer: a name for `Scorer.load`, a judge, or `None` for the bundled judge of a bundled model.
        source: what the model was named by.

    Raises:
        RequestError: no judge is named and the model has none of its own.
        ModelNotFoundError: it cannot be loaded.
    """
    if scorer is None and not source.startswith(PREFIX):
        raise RequestError(
            "this model has no judge of its own",
            value=repr(source),
            cause="the bundled judge knows the bundled model's pictures alone",
            hint="name a CLIP model with scorer= (--scorer), such as openai/clip-vit-large-patch14",
        )
    if scorer is None or isinstance(scorer, str):
        return Scorer.load(scorer or "builtin:emoji-scorer")
    if not isinstance(scorer, Judge):
        hint = "it needs name, digest, embed_images and embed_texts; or give a name"
        raise RequestError("that is no judge", value=type(scorer).__name__, hint=hint)
    return scorer


class Detector:
    """Names pictures; see the module's text.

    Args:
        judge: the judge.
        captions: name -> its captions.
    """

    def __init__(self, judge: Judge, captions: Mapping[str, Sequence[str]]) -> None:
        self.names = tuple(captions)
        centres = torch.stack([judge.embed_texts(captions[name]).mean(0) for name in self.names])
        self._centres = torch.nn.functional.normalize(centres, dim=1).double().numpy()

    def name(self, vectors: Array) -> list[str]:
        """The name of each picture [n, d]."""
        return [self.names[int(i)] for i in (vectors @ self._centres.T).argmax(1)]


def captions(kind: Kind, names: Sequence[str]) -> dict[str, list[str]]:
    """The captions of objects or styles, by name."""
    if kind == "style":
        return {name: [form.format(name) for form in STYLE_CAPTIONS] for name in names}
    return {name: [form.format(with_article(name)) for form in OBJECT_CAPTIONS] for name in names}


def by_nearness(judge: Judge, subjects: Sequence[str], names: Sequence[str], kind: Kind) -> list[str]:
    """`names`, those first whose captions the judge's text tower puts nearest to one of the subjects'.

    The vectors are centred first: CLIP puts all texts into one narrow cone.
    """
    if not names:
        return []
    listed = captions(kind, [*subjects, *names])
    vectors = torch.stack([judge.embed_texts(texts).mean(0) for texts in listed.values()]).double()
    vectors = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=1)
    position = {name: i for i, name in enumerate(listed)}
    mine = vectors[[position[name] for name in subjects]]
    best = (vectors[[position[name] for name in names]] @ mine.T).max(1).values.tolist()
    order = np.argsort([-round(value, 9) for value in best], kind="stable")
    return [names[int(i)] for i in order]


def file_digest(*parts: object) -> str:
    """Hex digest of texts and bytes, for names of files."""
    found = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()
