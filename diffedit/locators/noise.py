"""The corruption of a causal trace: Gaussian noise on the word embeddings of the subject.

Source: ROME (Meng et al. 2022, arXiv 2202.05262), which the paper's protocol copies, adds noise of three times the
standard deviation of the embeddings; the paper itself (arXiv 2310.13730) states no number. So the size is a setting: a
multiple of the standard deviation of the whole embedding table, or an absolute one. Too little noise leaves the
concept in place (the trace then says so); far too much pushes every later layer off what it was trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffedit.site import SubjectSpan


def noise_size(multiple: float, table_std: float, absolute: float | None = None) -> float:
    """Standard deviation of the noise; an absolute one wins.

    >>> noise_size(3.0, 0.5), noise_size(3.0, 0.5, absolute=0.1)
    (1.5, 0.1)
    """
    return multiple * table_std if absolute is None else absolute


def subject_noise(span: SubjectSpan, width: int, std: float, seed: int) -> Tensor:
    """[s, width] float32 noise for the s subject tokens; the same seed gives the same noise in every prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(span.stop - span.start, width, generator=generator) * std
