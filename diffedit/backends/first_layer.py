"""The first attention layer of a CLIP text encoder, at single tokens, for thousands of prompts.

What goes into the first block depends on a token and its position only, so each distinct (token, position) is embedded,
normalised and projected once, whatever number of prompts it stands in:

    x = E[token] + P[position],   h = LN(x),   q, k, v = W h + b

and what `out_proj` reads at position i needs one query and the keys and values of the prefix:

    input_i = concat_heads softmax(scale q_i [k_0 .. k_i]^T) [v_0 .. v_i]        stream_i = x_i

The encoder is causal: later tokens, padding included, cannot matter. Two prompts with one prefix are one computation.

Row-independence: every product has at least 16 rows and a multiple of 16 (zeros fill up), and attention is written out
as sums over one prefix. Then a token's numbers do not depend on what it is computed with: matrix libraries change their
order of summation for fewer than four rows, not beyond, on the processors tried, while their batched attention does
change it (tests/tiny/test_speed_paths.py checks the processor at hand). Everything runs in float32 (float64 for a
float64 model), half-precision weights are widened.

Limits: only plain modules. An adapter, a hook or a replaced `forward` anywhere on the way, and `plain_first_layer` says
no: then the model itself runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffedit.reading import Place

ROWS = 16
_CHUNK = 2048


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


def read_first_layer(root: Any, places: Sequence[Place]) -> tuple[Tensor, Tensor]:
    """Input of the first layer's `out_proj` and the residual stream beside it.

    Args:
        root: see `plain_first_layer`.
        places: n tokens, each (span with its token ids, position).

    Returns:
        inputs [n, d] and streams [n, d].
    """
    prefixes: dict[tuple[int, ...], int] = {}
    index = [prefixes.setdefault(span.tokens[: i + 1], len(prefixes)) for span, i in places]
    device = root.embeddings.token_embedding.weight.device
    inputs, streams = _read(root, list(prefixes), device)
    rows = torch.tensor(index, device=device)
    return inputs[rows], streams[rows]


def _read(root: Any, prefixes: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    layer, positions = root.encoder.layers[0], root.embeddings.position_embedding.num_embeddings
    attention = layer.self_attn
    groups: dict[int, list[int]] = {}
    for i, prefix in enumerate(prefixes):
        groups.setdefault(len(prefix), []).append(i)
    codes = {
        length: torch.tensor([prefixes[i] for i in members]) * positions + torch.arange(length)
        for length, members in groups.items()
    }
    distinct, inverse = torch.unique(torch.cat([code.flatten() for code in codes.values()]), return_inverse=True)
    where = dict(zip(codes, inverse.split([code.numel() for code in codes.values()]), strict=True))
    last = torch.cat([code[:, -1] for code in codes.values()])
    asked, asking = torch.unique(last, return_inverse=True)
    queries = dict(zip(codes, asking.split([len(code) for code in codes.values()]), strict=True))

    stream, normed = _embed(root, distinct.to(device), positions)
    k, v = _linear(attention.k_proj, normed), _linear(attention.v_proj, normed)
    at = torch.searchsorted(distinct, asked).to(device)
    q = _linear(attention.q_proj, _padded(normed[at]))
    inputs = stream.new_empty(len(prefixes), stream.shape[1])
    streams = torch.empty_like(inputs)
    for length, members in groups.items():
        keys, asks = where[length].view(-1, length).to(device), queries[length].to(device)
        for start in range(0, len(members), _CHUNK):
            part = slice(start, start + _CHUNK)
            rows = torch.tensor(members[part], device=device)
            inputs[rows] = _attend(attention, q[asks[part]], k[keys[part]], v[keys[part]])
            streams[rows] = stream[keys[part, -1]]
    return inputs, streams


def _embed(root: Any, codes: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """The stream x and the normed h of each (token, position), rows filled up to a multiple of `ROWS`."""
    words, places = root.embeddings.token_embedding.weight, root.embeddings.position_embedding.weight
    norm = root.encoder.layers[0].layer_norm1
    exact = torch.promote_types(words.dtype, torch.float32)
    stream = words[codes // positions].to(exact) + places[codes % positions].to(exact)
    stream = _padded(stream)
    weight, bias = (None if part is None else part.to(exact) for part in (norm.weight, norm.bias))
    return stream, F.layer_norm(stream, norm.normalized_shape, weight, bias, norm.eps)


def _attend(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[b, d]: one query each (q [b, d]) over its prefix (k, v [b, t, d])."""
    b, t, d = k.shape
    heads = attention.num_heads
    keys, values = (x.view(b, t, heads, d // heads) for x in (k, v))
    scores = (keys * (q * attention.scale).view(b, 1, heads, d // heads)).sum(-1)
    shares = (scores - scores.amax(1, keepdim=True)).exp()
    shares = shares / shares.sum(1, keepdim=True)
    mixed = values[:, 0] * shares[:, 0, :, None]
    for i in range(1, t):
        mixed = mixed + values[:, i] * shares[:, i, :, None]
    out: Tensor = mixed.reshape(b, d)
    return out


def _linear(module: Any, rows: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.to(rows.dtype)
    return F.linear(rows, module.weight.to(rows.dtype), bias)


def _padded(rows: Tensor) -> Tensor:
    """The rows and zeros, up to a multiple of `ROWS`."""
    return F.pad(rows, (0, 0, 0, -len(rows) % ROWS))
