"""Render the icons once, treat them into six styles, and composite them on coloured backgrounds.

`build` needs the unpacked icon packages (`npm pack @iconify-json/noto` and so on, see README.md); everything else needs
only the resulting `icons.npy` of shape [objects, styles, 56, 56, 4].
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageFilter
from tqdm import tqdm

from .common import log, save_grid
from .world import BACKGROUNDS, ICON_NAMES, ICON_PIXELS, OBJECTS, PIXELS, STYLES

NAVY = "#1b2a5c"
JITTER = (PIXELS - ICON_PIXELS) // 2 - 1


def svg_of(collection: dict, name: str, side: int) -> str:
    """A stand-alone SVG of one icon of an Iconify collection."""
    while name in collection.get("aliases", {}):
        name = collection["aliases"][name]["parent"]
    icon = collection["icons"][name]
    left, top, width, height = (
        icon.get(key, collection.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{side}" height="{side}">'
        f"{icon['body'].replace('currentColor', NAVY)}</svg>"
    )


def render(svg: str) -> Image.Image:
    """SVG text -> RGBA picture."""
    import resvg_py

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


def _centred(icon: Image.Image) -> Image.Image:
    canvas = Image.new("RGBA", (ICON_PIXELS, ICON_PIXELS), (0, 0, 0, 0))
    canvas.paste(icon, ((ICON_PIXELS - icon.width) // 2, (ICON_PIXELS - icon.height) // 2))
    return canvas


def pixelate(icon: Image.Image, blocks: int = 14) -> Image.Image:
    """Coarse blocks: box-average premultiplied colours, few colour levels, hard alpha."""
    rgba = np.asarray(icon, np.float32) / 255
    size = icon.width // blocks
    premultiplied = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1)
    cells = premultiplied.reshape(blocks, size, blocks, size, 4).mean((1, 3))
    solid = cells[..., 3] > 0.4
    colour = np.where(solid[..., None], cells[..., :3] / np.maximum(cells[..., 3:], 1e-4), 0)
    colour = np.round(colour.clip(0, 1) * 5) / 5
    small = (np.dstack([colour, solid]) * 255).round().astype(np.uint8)
    return Image.fromarray(small.repeat(size, 0).repeat(size, 1))


def sepia(icon: Image.Image) -> Image.Image:
    """Brown monochrome from the luminance."""
    rgba = np.asarray(icon, np.float32)
    light = (rgba[..., :3] @ np.array([0.3, 0.59, 0.11], np.float32) / 255)[..., None] ** 1.2
    toned = (1 - light) * np.array([62, 32, 10]) + light * np.array([222, 178, 120])
    return Image.fromarray(np.dstack([toned, rgba[..., 3]]).round().astype(np.uint8))


def sticker(icon: Image.Image) -> Image.Image:
    """A wide white border around the silhouette and a dark rim around that."""
    canvas = _centred(icon)
    alpha = canvas.getchannel("A").point(lambda a: 255 if a > 60 else 0)
    soft = ImageFilter.GaussianBlur(0.7)
    white = alpha.filter(ImageFilter.MaxFilter(7)).filter(soft)
    rim = alpha.filter(ImageFilter.MaxFilter(9)).filter(ImageFilter.MaxFilter(3)).filter(soft)
    result = Image.new("RGBA", canvas.size, (70, 74, 88, 0))
    result.putalpha(rim)
    paper = Image.new("RGBA", canvas.size, (255, 255, 255, 0))
    paper.putalpha(white)
    return Image.alpha_composite(Image.alpha_composite(result, paper), canvas)


def build(packages: Path, work: Path) -> np.ndarray:
    """Render every object in every style and keep the result in `<work>/icons.npy`."""
    work.mkdir(parents=True, exist_ok=True)
    icons = np.zeros((len(OBJECTS), len(STYLES), ICON_PIXELS, ICON_PIXELS, 4), np.uint8)
    for column, style in enumerate(tqdm(STYLES.values(), desc="styles")):
        collection = json.loads((packages / style.package / "icons.json").read_text())
        side = 46 if style.treatment == "sticker" else ICON_PIXELS
        treat = {"pixel": pixelate, "sepia": sepia, "sticker": sticker}.get(style.treatment, _centred)
        for row, name in enumerate(OBJECTS):
            icon = render(svg_of(collection, ICON_NAMES.get(name, name.replace(" ", "-")), side))
            icons[row, column] = np.asarray(treat(icon))
    np.save(work / "icons.npy", icons)
    log.info("rendered %d objects in %d styles", len(OBJECTS), len(STYLES))
    source = Pictures(icons)
    sheet = [source.draw(o, s, o % len(BACKGROUNDS), 0, 0) for s in range(len(STYLES)) for o in range(len(OBJECTS))]
    save_grid(torch.stack(sheet), work / "contact-sheet.png", 33)
    return icons


class Pictures:
    """Draws (object, style, background) pictures with a few pixels of jitter, as float tensors in [-1, 1]."""

    def __init__(self, icons: np.ndarray) -> None:
        rgba = torch.from_numpy(icons).float().permute(0, 1, 4, 2, 3) / 255
        self.colour = (rgba[:, :, :3] * rgba[:, :, 3:]).contiguous()
        self.alpha = rgba[:, :, 3:].contiguous()
        self.grounds = torch.tensor(list(BACKGROUNDS.values())).float() / 255

    @classmethod
    def load(cls, work: Path) -> Pictures:
        """Read the icons written by `build`."""
        return cls(np.load(work / "icons.npy"))

    def draw(self, name: int, style: int, ground: int, dx: int, dy: int) -> torch.Tensor:
        """One picture; `dx`, `dy` shift the icon from the centre."""
        picture = self.grounds[ground][:, None, None].expand(3, PIXELS, PIXELS).clone()
        x, y = (PIXELS - ICON_PIXELS) // 2 + dx, (PIXELS - ICON_PIXELS) // 2 + dy
        window = picture[:, y : y + ICON_PIXELS, x : x + ICON_PIXELS]
        window.mul_(1 - self.alpha[name, style]).add_(self.colour[name, style])
        return picture * 2 - 1

    def batch(self, rng: Random, size: int) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
        """Uniformly drawn pictures and their (object, style, background) indices."""
        labels = [
            (rng.randrange(len(OBJECTS)), rng.randrange(len(STYLES)), rng.randrange(len(BACKGROUNDS)))
            for _ in range(size)
        ]
        shifts = [(rng.randint(-JITTER, JITTER), rng.randint(-JITTER, JITTER)) for _ in range(size)]
        return torch.stack([self.draw(*label, *shift) for label, shift in zip(labels, shifts, strict=True)]), labels
