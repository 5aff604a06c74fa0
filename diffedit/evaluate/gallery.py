"""The pictures of an evaluation, kept as they are drawn, so that an interrupted evaluation goes on where it stopped.

A picture's file name ends in a hash of everything that it depends on: weights, prompt, seed, steps, guidance. What is
there is not drawn again; pictures of another edit or of other settings have other names. The judge's vectors are kept
beside them, per group and side, under a hash of the judge and the pictures. Without a folder everything stays in
memory.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save

from diffedit import drawing
from diffedit.editor import Editor
from diffedit.errors import StorageError
from diffedit.evaluate.judge import Judge, file_digest
from diffedit.evaluate.metrics import Array
from diffedit.evaluate.suite import Job
from diffedit.io.folder import write_file
from diffedit.ledger import tensor_hash
from diffedit.traceable import Traceable

PICTURES, VECTORS = "pictures", "vectors"
_CHUNK = 64

Side = Literal["before", "after"]


class Gallery:
    """Pictures by name.

    Args:
        folder: where to keep them, or `None` for memory alone.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, bytes] = {}

    @property
    def shared(self) -> bool:
        """Whether other processes see what this one keeps."""
        return self._folder is not None

    def read(self, name: str) -> Image.Image:
        """The picture of that name.

        Raises:
            StorageError: it is not there, or no picture.
        """
        try:
            data = self._memory[name] if self._folder is None else (self._folder / name).read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                return image.convert("RGB")
        except (OSError, KeyError, ValueError, Image.DecompressionBombError) as error:
            hint = "run the evaluation again: it draws what is missing"
            raise StorageError("a picture of the evaluation cannot be read", value=repr(name), hint=hint) from error

    def has(self, name: str) -> bool:
        """Whether the picture is there and whole."""
        try:
            self.read(name)
        except StorageError:
            return False
        return True

    def write(self, name: str, image: Image.Image) -> None:
        """Keep a picture, losslessly."""
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="PNG")
        if self._folder is None:
            self._memory[name] = buffer.getvalue()
        else:
            write_file(self._folder / name, buffer.getvalue(), overwrite=True)

    def vectors(self, judge: Judge, digest: str, names: Sequence[str]) -> Array:
        """[n, d] float64, the judge's unit vectors of the pictures, from the folder if they are there."""
        key = file_digest(digest, *names)[:32]
        path = None if self._folder is None else self._folder / VECTORS / f"{key}.safetensors"
        if path is not None and path.is_file():
            with suppress(OSError, SafetensorError, KeyError):
                kept: Array = load(path.read_bytes())["vectors"].double().numpy()
                if len(kept) == len(names):
                    return kept
        chunks = [names[i : i + _CHUNK] for i in range(0, len(names), _CHUNK)]
        found = torch.cat([judge.embed_images([self.read(name) for name in chunk]) for chunk in chunks]).cpu()
        found = found.float().contiguous()
        if path is not None:
            write_file(path, save({"vectors": found}), overwrite=True)
        numbers: Array = found.double().numpy()
        return numbers


def draw(
    editor: Editor,
    jobs: Sequence[Job],
    side: Side,
    weights: str,
    gallery: Gallery,
    sampling: Mapping[str, float | int | None],
    batch_size: int,
    done: Callable[[int], None],
) -> list[str]:
    """Draw what is missing with the model as it is, each process its share if they keep pictures in one folder.

    Args:
        editor: the model.
        jobs: what to draw.
        side: for the names.
        weights: `weights_of` the model.
        gallery: where it is kept.
        sampling: `steps` and `guidance`, filled in.
        batch_size: pictures sampled together.
        done: called with how many more pictures are there.

    Returns:
        The pictures' names, one per job.
    """
    names = [_name(job, side, weights, sampling) for job in jobs]
    wanted = dict(zip(names, jobs, strict=True))
    missing = [name for name in wanted if not gallery.has(name)]
    done(len(jobs) - len(missing))
    steps, guidance = sampling["steps"], sampling["guidance"]

    def keep(i: int, image: Image.Image) -> None:
        gallery.write(missing[i], image)
        done(1)

    mine = drawing.draw(
        editor,
        [(wanted[name].prompt, wanted[name].seed) for name in missing],
        keep,
        steps=None if steps is None else int(steps),
        guidance=guidance,
        batch_size=batch_size,
        shared=gallery.shared,
    )
    done(len(missing) - mine)
    return names


def weights_of(editor: Editor) -> str:
    """Hex digest of the live weights, active edits included."""
    backend = editor.backend
    if isinstance(backend, Traceable):
        return backend.digest()
    sites = [tensor_hash(backend.weight(site)) for site in backend.sites()]
    return file_digest(*sorted(backend.fingerprints().items()), *sites)


def _name(job: Job, side: Side, weights: str, sampling: Mapping[str, float | int | None]) -> str:
    key = file_digest(weights, job.prompt, job.seed, sampling["steps"], sampling["guidance"])[:16]
    slug = re.sub(r"[^a-z0-9]+", "-", job.prompt.lower()).strip("-")[:40].rstrip("-") or "prompt"
    return f"{PICTURES}/{job.group}/{slug}-{job.seed}-{side}-{key}.png"
