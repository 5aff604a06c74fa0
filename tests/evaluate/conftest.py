"""A model that paints what a script says, and a judge that reads it: all arithmetic can be done by hand."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from diffedit import Editor
from diffedit.text import find
from tests.saved_model import save_tiny_model

NAMES = ("nothing", "dog", "cat", "pig", "house", "tree", "boat", "fish")
STEP = 30  # difference in brightness between two names


def shown(prompt: str) -> str:
    """The last name that a prompt holds."""
    held = [(start, name) for name in NAMES[1:] for start, _ in find(prompt, name)]
    return max(held)[1] if held else "nothing"


class Reader:
    """A judge that reads a picture's brightness, and knows the names above; its vectors are one-hot."""

    name = "reader"

    def __init__(self, near: dict[str, str] | None = None) -> None:
        self.seen = 0
        self._near = near or {}

    def digest(self) -> str:
        return "0" * 64

    def embed_images(self, images):
        self.seen += len(images)
        return self._vectors([NAMES[round(image.getpixel((0, 0))[0] / STEP)] for image in images])

    def embed_texts(self, texts):
        return self._vectors([shown(text) for text in texts])

    def _vectors(self, names):
        """One-hot, but `near` leans a name towards another."""
        out = torch.zeros(len(names), len(NAMES))
        for row, name in enumerate(names):
            out[row, NAMES.index(name)] = 1.0
            if name in self._near:
                out[row, NAMES.index(self._near[name])] = 0.5
        return torch.nn.functional.normalize(out, dim=1)


class Painter:
    """Draws one brightness per name. `script(prompt, seed, edited)` says which; the default paints the prompt.

    Attributes:
        drawn: how many pictures it drew.
        stop_after: raise KeyboardInterrupt when that many are drawn.
    """

    def __init__(self, editor: Editor, script=None) -> None:
        self._editor = editor
        self.script = script or (lambda prompt, seed, edited: shown(prompt))
        self.drawn = 0
        self.calls: list[tuple[str, int, bool]] = []
        self.stop_after: int | None = None

    def __call__(self, pairs, *, steps, guidance, batch_size):
        edited = bool(self._editor.ledger.active)
        images = []
        for prompt, seed in pairs:
            if self.drawn == self.stop_after:
                raise KeyboardInterrupt
            value = NAMES.index(self.script(prompt, seed, edited)) * STEP
            images.append(Image.new("RGB", (4, 4), (value,) * 3))
            self.calls.append((prompt, seed, edited))
            self.drawn += 1
        return images


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def editor(model):
    return Editor(str(model))


@pytest.fixture
def edit(editor):
    """An edit of the dog, not in the model."""
    made = editor.ablate("dog", target="cat", preserve=["pig"])
    editor.revert()
    return made


@pytest.fixture
def painter(editor):
    editor.backend.generate = Painter(editor)
    return editor.backend.generate
