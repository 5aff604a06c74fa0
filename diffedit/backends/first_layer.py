"""The first attention layer of a CLIP text encoder, at single tokens, for thousands of prompts.

What goes into the first block depends on a token and its position only, so each distinct (token, position) is embedded,
normalised and projected once, whatever number of prompts it stands in:

    x = E[token] + P[position],   h = LN(x),   q, k, v = W h + b

and what `out_proj` reads at position i needs one query and the keys and values of the prefix:

    input_i = concat_heads softmax(scale q_i [k_0 .. k_i]^T) [v_0 .. v_i]        stream_i = x_i

The encoder is causal: later tokens, padding included, cannot matter. Two prompts with one prefix are one computation.

Row-independence: each projection is a `linalg.product`, and attention is written out as sums over one prefix: batched
attention changes its order of summation with the batch (tests/tiny/test_speed_paths.py). Everything runs in float32
(float64 for a float64 model), half-precision weights are widened.

Limits: only plain modules. An adapter, a hook or a replaced `forward` anywhere on the way, and `plain_first_layer` says
no: then the model itself runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffedit.linalg.product import product
from diffedit.reading import Numbers, Place

_CHUNK = 136  # prompts, at most, whose rows fit the processor's own cache


def plain_first_layer(encoder: Any, root: Any) -> bool:
    """Whether the first layer is CLIP's own, untouched by hooks, adapters and replaced methods.

    Args:
        encoder: the text encoder.
        root: the module of it that holds `embeddings` and `encoder`.
    """
    layer = root.encoder.layers[0]
    attention, embeddings = layer.self_attn, root.embeddings
    linear = [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj]
    tables = [embeddings.token_embedding, embeddings.position_embedding]
    plain = (
        type(attention).__name__ == "CLIPAttention"
        and type(embeddings).__name__ == "CLIPTextEmbeddings"
        and all(type(module) is nn.Linear for module in linear)
        and all(type(module) is nn.Embedding for module in tables)
        and type(layer.layer_norm1) is nn.LayerNorm
    )
    way = (encoder, root, root.encoder, layer, attention, embeddings, layer.layer_norm1, *linear, *tables)
    return plain and not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in way
    )


class FirstLayer:
    """Input of the first layer's `out_proj` and the residual stream beside it, at n tokens.

    Everything that depends on a weight is computed at once, attention for those tokens that are taken.

    Args:
        root: see `plain_first_layer`.
        places: n tokens, each (span with its token ids, position).
    """

    def __init__(self, root: Any, places: Sequence[Place]) -> None:
        prefixes: dict[tuple[int, ...], int] = {}
        index = [prefixes.setdefault(span.tokens[: i + 1], len(prefixes)) for span, i in places]
        self._prefix = np.array(index, np.int64)  # of each token
        embeddings, attention = root.embeddings, root.encoder.layers[0].self_attn
        table, self._lengths = _table(list(prefixes), embeddings.position_embedding.num_embeddings)
        distinct, self._where = _unique(table)
        self._last = self._where[np.arange(len(table)), self._lengths - 1]
        self._heads = attention.num_heads
        self._device = embeddings.token_embedding.weight.device
        self._stream, normed = _embed(root, self._there(distinct))
        self._k, self._v = _linear(attention.k_proj, normed), _linear(attention.v_proj, normed)
        self._q = _linear(attention.q_proj, normed).mul_(attention.scale)

    def take(self, index: Numbers) -> tuple[Tensor, Tensor]:
        """Inputs [b, d] and streams [b, d] at b of the tokens, by their numbers."""
        prefixes, at = _unique(self._prefix[index])
        ascending = np.argsort(self._lengths[prefixes], kind="stable")  # so that a chunk's lengths differ little
        places = np.empty_like(ascending)
        places[ascending] = np.arange(len(ascending))
        size = math.ceil(len(ascending) / math.ceil(len(ascending) / _CHUNK))
        with torch.no_grad():
            chunks = (ascending[start : start + size] for start in range(0, len(ascending), size))
            inputs = torch.cat([self._attend(prefixes[rows]) for rows in chunks])
        streams = self._stream.index_select(0, self._there(self._last[prefixes[at]]))
        return inputs.index_select(0, self._there(places[at])), streams

    def _attend(self, prefixes: Numbers) -> Tensor:
        """[b, d]: the query of each prefix over its tokens; the last prefix is the longest.

        Sums run over the prefix one token after the other. Beyond a prefix the shares are zero, which adds nothing: so
        its bits do not depend on the longest one beside it.
        """
        lengths = self._lengths[prefixes]
        t, b = int(lengths[-1]), len(prefixes)
        keys = self._there(self._where[prefixes, :t].T.reshape(-1))
        q = self._q.index_select(0, self._there(self._last[prefixes])).view(b, self._heads, -1)
        scores = self._k.index_select(0, keys).view(t, *q.shape).mul_(q).sum(-1)
        if t > lengths[0]:
            beyond = self._there(np.arange(t)[:, None] >= lengths)
            scores.masked_fill_(beyond[..., None], -torch.inf)
        shares = scores.sub_(scores.amax(0)).exp_()
        mixed = self._v.index_select(0, keys).view(t, *q.shape).mul_(shares[..., None])
        for i in range(1, t):
            shares[0] += shares[i]
            mixed[0] += mixed[i]
        return (mixed[0] / shares[0][..., None]).reshape(b, -1)

    def _there(self, numbers: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(numbers).to(self._device)


def _table(prefixes: Sequence[tuple[int, ...]], positions: int) -> tuple[Numbers, Numbers]:
    """One code for each (token, position), [b, t], short prefixes filled up with their first; lengths [b]."""
    lengths = np.fromiter(map(len, prefixes), np.int64, len(prefixes))
    places = np.arange(int(lengths.max()))
    held = places < lengths[:, None]
    table = np.zeros(held.shape, np.int64)
    table[held] = np.fromiter(chain.from_iterable(prefixes), np.int64, int(lengths.sum()))
    codes = table * positions + places
    return np.where(held, codes, codes[:, :1]), lengths


def _unique(numbers: Numbers) -> tuple[Numbers, Numbers]:
    """The distinct numbers in order, and for each number which of them it is."""
    distinct, where = np.unique(numbers, return_inverse=True)
    return distinct, where.reshape(numbers.shape)


def _embed(root: Any, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The stream x and the normed h of each (token, position)."""
    words, places = root.embeddings.token_embedding.weight, root.embeddings.position_embedding.weight
    norm = root.encoder.layers[0].layer_norm1
    exact = torch.promote_types(words.dtype, torch.float32)
    stream = words[codes // len(places)].to(exact) + places[codes % len(places)].to(exact)
    weight, bias = (None if part is None else part.to(exact) for part in (norm.weight, norm.bias))
    return stream, F.layer_norm(stream, norm.normalized_shape, weight, bias, norm.eps)


def _linear(module: Any, rows: Tensor) -> Tensor:
    out = product(rows, module.weight.to(rows.dtype))
    return out if module.bias is None else out.add_(module.bias.to(rows.dtype))
