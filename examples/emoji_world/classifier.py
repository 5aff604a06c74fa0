"""An independent judge for the quality gate: a small convnet with object, style and background heads.

It shares nothing with the generator or the scorer, and is trained on the drawn pictures with blur, noise, colour
shifts and autoencoder copies. It is not shipped.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

from .augment import Copies, augmented
from .common import log, train
from .pictures import Pictures
from .world import BACKGROUNDS, OBJECTS, STYLES

HEADS = (len(OBJECTS), len(STYLES), len(BACKGROUNDS))


class Classifier(nn.Module):
    """Five strided convolutions, average and maximum pooling, three linear heads."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        layers += [nn.Conv2d(before, before, 3, padding=1, bias=False), nn.BatchNorm2d(before), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(before * 16, 256), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(256, count) for count in HEADS)

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Pictures in [-1, 1] -> logits of object, style, background."""
        features = self.body(pictures)
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def predict(self, pictures: torch.Tensor) -> torch.Tensor:
        """[n, 3] indices of object, style, background."""
        self.eval()
        return torch.cat([torch.stack([x.argmax(1) for x in self(part)], 1) for part in pictures.split(128)])


def train_classifier(work: Path, minutes: float, copies: Copies, seed: int = 3, batch: int = 64) -> Classifier:
    """Train (resumable) and write `<work>/classifier.safetensors`."""
    source, rng = Pictures.load(work), Random(seed)
    torch.manual_seed(seed)
    model = Classifier()

    def loss_of(step: int) -> torch.Tensor:
        pictures, labels = source.batch(rng, batch)
        outputs = model(augmented(pictures, rng, copies.of(labels)))
        wanted = torch.tensor(labels)
        return sum(cross_entropy(out, wanted[:, i], label_smoothing=0.05) for i, out in enumerate(outputs))

    def report(step: int) -> None:
        log.info("classifier: step %d, accuracy %s", step, judge(model, source, copies))

    train(
        "classifier", work, model, loss_of, steps=100_000, minutes=minutes, rate=2e-3, report=report, report_every=500
    )
    report(0)
    save_file(model.state_dict(), work / "classifier.safetensors")
    return model


def judge(model: Classifier, source: Pictures, copies: Copies, n: int = 600) -> list[float]:
    """Accuracy of the three heads on freshly disturbed pictures."""
    rng = Random(777)
    pictures, labels = source.batch(rng, n)
    hits = model.predict(augmented(pictures, rng, copies.of(labels))) == torch.tensor(labels)
    return [round(x, 4) for x in hits.float().mean(0).tolist()]


def load_classifier(work: Path) -> Classifier:
    """The trained judge."""
    model = Classifier()
    model.load_state_dict(load_file(work / "classifier.safetensors"))
    return model.eval()
