"""A picture judge that is not the edited model: a CLIP model with an image and a text tower.

`builtin:emoji-scorer` was trained apart from `builtin:emoji` (other seed, other architecture) and knows the same
words. Any transformers `CLIPModel` folder or Hub id works as well. Scores are cosines between a picture and a caption
(CLIPScore without its constant, Hessel et al. 2021, arXiv 2104.08718); classification takes the label whose captions
fit best on average.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffedit.bundled import PREFIX, bundled
from diffedit.errors import ModelNotFoundError
from diffedit.text import with_article

if TYPE_CHECKING:
    from PIL.Image import Image

OBJECT_CAPTIONS = ("{}", "a picture of {}", "an icon of {}")


class Scorer:
    """A CLIP model used as a judge.

    Args:
        model: the CLIP model, in evaluation mode.
        tokenizer: its tokenizer.
        processor: its image processor.
        batch_size: pictures embedded together.
        name: what reports call it.
    """

    def __init__(
        self, model: CLIPModel, tokenizer: Any, processor: Any, batch_size: int = 64, name: str = "a CLIP model"
    ) -> None:
        self.name = name
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._processor = processor
        self._batch_size = batch_size

    @classmethod
    def load(cls, name: str = "builtin:emoji-scorer") -> Scorer:
        """Load a built-in scorer, a folder or a Hub id; safetensors only.

        Raises:
            UnknownNameError: no built-in scorer of that name.
            ModelNotFoundError: it cannot be loaded.
        """
        source = str(bundled("scorer", name)) if name.startswith(PREFIX) else name
        try:
            model = CLIPModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
            tokenizer, processor = CLIPTokenizer.from_pretrained(source), CLIPImageProcessor.from_pretrained(source)
            return cls(model, tokenizer, processor, name=Path(name).name if Path(name).exists() else name)
        except (OSError, ValueError) as error:
            cause = str(error).strip().splitlines()[0]
            raise ModelNotFoundError("the scorer cannot be loaded", value=repr(name), cause=cause) from error

    def digest(self) -> str:
        """SHA-256 of every weight's bytes, by name: two judges with one digest judge alike."""
        found = hashlib.sha256()
        for key, tensor in sorted(self._model.state_dict().items()):
            found.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def embed_images(self, images: Sequence[Image]) -> Tensor:
        """[n, d] unit vectors, one per picture."""
        out = []
        with torch.no_grad():
            for i in range(0, len(images), self._batch_size):
                chunk = [image.convert("RGB") for image in images[i : i + self._batch_size]]
                pixels = self._processor(images=chunk, return_tensors="pt")["pixel_values"]
                out.append(_pooled(self._model.get_image_features(pixel_values=pixels)))
        return torch.nn.functional.normalize(torch.cat(out), dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """[n, d] unit vectors, one per caption."""
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            features = _pooled(self._model.get_text_features(input_ids=tokens["input_ids"]))
        return torch.nn.functional.normalize(features, dim=1)

    def scores(self, images: Sequence[Image], captions: Sequence[str]) -> Tensor:
        """[n, m] cosine of every picture with every caption."""
        return self.embed_images(images) @ self.embed_texts(captions).T

    def classify(self, images: Sequence[Image], labels: Mapping[str, Sequence[str]]) -> list[str]:
        """The label of each picture.

        Args:
            images: n pictures.
            labels: label -> its captions; their unit vectors are averaged.
        """
        names = list(labels)
        centres = torch.stack([self.embed_texts(labels[name]).mean(0) for name in names])
        best = (self.embed_images(images) @ torch.nn.functional.normalize(centres, dim=1).T).argmax(1)
        return [names[int(i)] for i in best]

    def name_objects(self, images: Sequence[Image], objects: Sequence[str]) -> list[str]:
        """Which of the objects each picture shows."""
        return self.classify(
            images, {name: [c.format(with_article(name)) for c in OBJECT_CAPTIONS] for name in objects}
        )


def _pooled(output: Any) -> Tensor:
    """Transformers 5 returns an output object where 4 returned the tensor."""
    pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return pooled.float()
