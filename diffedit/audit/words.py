"""Which words an edit moved: each word is run through the *base* model and shown to the difference of the weights.

For a changed layer y = W k + b with difference D, and a word whose last token gives the key k:

    moved = |D k| / |W k|         how far the layer's output for this word moved, in units of that output

the root mean square over `FRAMES`, and over several layers that of the layers' numbers. For the table of token
embeddings k picks the token's row. D and W are read from the files, keys come from `Backend.capture`:

    self_attn.out_proj, mlp.fc2   the recorded input
    self_attn.{q,k,v}_proj        layer_norm1 of the residual stream that enters the attention
    mlp.fc1                       layer_norm2 of the stream that enters the MLP
    unet ... attn2.to_{k,v}       the text encoder's output: final_layer_norm of the last block's stream + MLP output

so no UNet is loaded. Limits: keys are the base's; where an earlier layer changed too, the edited model's own keys at a
later one differ a little. Of Stable Diffusion XL both text encoders are run, but not to its cross-attention, which
reads the two together, to the last blocks, nor to the second encoder's token embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn.functional import layer_norm

from diffedit.audit.weights import Weights
from diffedit.errors import RequestError, SubjectNotFoundError, SubjectTruncatedError
from diffedit.interfaces import Backend
from diffedit.site import EditSite, Role, SubjectSpan
from diffedit.text import clean, render

FRAMES = ("{}", "a photo of a {}")
TOP = 20

_BATCH = 64
_EPS = 1e-5  # of every CLIP layer norm
_LAYER = re.compile(
    r"(?P<encoder>text_encoder(?:_2)?)\.text_model\.encoder\.layers\."
    r"(?P<layer>\d+)\.(?P<block>self_attn|mlp)\.(?P<part>\w+)\.weight"
)
_FIRST = "text_encoder"
_CROSS = re.compile(r"unet\..+\.attn2\.to_[kv]\.weight")
_FINAL = "text_encoder.text_model.final_layer_norm"
_TOKENS = "text_encoder.text_model.embeddings.token_embedding.weight"
_ROLES = {"self_attn": Role.TEXT_SELF_ATTN_OUT, "mlp": Role.TEXT_MLP_OUT}
_OUTPUTS = ("out_proj", "fc2")


class WordMove(BaseModel):
    """How far one word moved: `moved` = |D k| / |W k|."""

    model_config = ConfigDict(frozen=True)

    word: str
    moved: float


class WordMoves(BaseModel):
    """The words at one layer, or over all changed layers, those that moved most first.

    Attributes:
        layer: canonical name of the weight; "all" for the mean over layers.
        words: every word that was run, furthest first.
        median: the middle of `moved`: what the edit does to words that it does not mean.
    """

    model_config = ConfigDict(frozen=True)

    layer: str
    words: tuple[WordMove, ...]
    median: float

    @property
    def top(self) -> tuple[WordMove, ...]:
        """The `TOP` words that moved most."""
        return self.words[:TOP]


@dataclass(frozen=True, eq=False)
class _Prompts:
    """Prompts of all words, word by word and frame by frame."""

    words: tuple[str, ...]
    texts: tuple[str, ...]
    spans: tuple[SubjectSpan, ...]


def reachable(name: str) -> bool:
    """Whether words can be run to the input of this weight."""
    match = _LAYER.fullmatch(name)
    known = ("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"), ("mlp", "fc1", "fc2")
    if match is not None:
        return any(match["block"] == block and match["part"] in parts for block, *parts in known)
    return name == _TOKENS or _CROSS.fullmatch(name) is not None


def clean_words(words: Iterable[str]) -> tuple[str, ...]:
    """The words without repetition and outer white space, in their order.

    Raises:
        RequestError: a word that no prompt can hold.
    """
    if isinstance(words, str):
        raise RequestError("words are given as a list", value=repr(words), hint="write ['dog', 'cat']")
    return tuple(dict.fromkeys(clean(word, "word") for word in words))


def rank_words(
    backend: Backend, base: Weights, edited: Weights, layers: Sequence[str], words: Sequence[str]
) -> tuple[list[WordMoves], WordMoves | None, tuple[str, ...]]:
    """How far each word moved at each layer.

    Args:
        backend: the base model.
        base: its weights.
        edited: the other model's.
        layers: canonical names of changed weights that are `reachable`.
        words: from `clean_words`.

    Returns:
        One table per layer that the backend has; the table over all of them (`None` without layers or words); the words
        that the text encoder cannot read.
    """
    prompts, unread = _prompts(backend, words)
    sites = {(site.component, site.layer, site.role): site for site in backend.sites(*_ROLES.values())}
    last = max((layer for encoder, layer, _ in sites if encoder == _FIRST), default=-1)
    ways = {name: site for name in layers if (site := sites.get(_way(name, last))) and _fits(name, base)}
    if not prompts.words or not ways:
        return [], None, unread
    keys = _Keys(backend, base, prompts, ways)
    tables, shares = [], []
    for name in ways:
        weight = base.tensor(name).double()
        change = edited.tensor(name).double() - weight
        moved, full = (_per_word(keys.through(name, matrix), len(prompts.words)) for matrix in (change, weight))
        shares.append(moved / full.clamp_min(1e-300))
        tables.append(_table(name, prompts.words, shares[-1]))
    return tables, _table("all", prompts.words, torch.stack(shares).mean(0)), unread


def _way(name: str, last: int) -> tuple[str, int, Role]:
    """Text encoder, block and role of the site through which a layer's input is found."""
    match = _LAYER.fullmatch(name)
    if match is not None:
        return match["encoder"], int(match["layer"]), _ROLES[match["block"]]
    return (_FIRST, 0, Role.TEXT_SELF_ATTN_OUT) if name == _TOKENS else (_FIRST, last, Role.TEXT_MLP_OUT)


def _fits(name: str, base: Weights) -> bool:
    """Whether a cross-attention layer reads this text encoder alone (SDXL's read two)."""
    norm = f"{_FINAL}.weight"
    return _CROSS.fullmatch(name) is None or (norm in base and base.shape(name)[1] == base.shape(norm)[0])


class _Keys:
    """Keys of every prompt at the inputs of the wanted layers, [prompts, d_in] float64 each."""

    def __init__(self, backend: Backend, base: Weights, prompts: _Prompts, ways: Mapping[str, EditSite]) -> None:
        self._base, self._ways = base, ways
        sites = tuple(dict.fromkeys(ways.values()))
        parts: dict[EditSite, list[tuple[Tensor, ...]]] = {site: [] for site in sites}
        tokens = []
        for start in range(0, len(prompts.texts), _BATCH):
            seen = backend.capture(prompts.texts[start : start + _BATCH], sites)
            place = torch.tensor([span.last for span in prompts.spans[start : start + _BATCH]])
            row = torch.arange(len(place))
            tokens.append(seen.tokens.cpu()[row, place])
            for site in sites:
                tensors = (seen.inputs[site], seen.streams[site], seen.outputs[site])
                parts[site].append(tuple(values.cpu()[row, place].double() for values in tensors))
        self._tokens = torch.cat(tokens)
        self._seen = {
            site: tuple(torch.cat(column) for column in zip(*chunks, strict=True)) for site, chunks in parts.items()
        }

    def through(self, name: str, matrix: Tensor) -> Tensor:
        """[prompts, d_out]: the matrix applied to the keys of the layer."""
        if name == _TOKENS:
            return matrix[self._tokens]
        inputs, stream, output = self._seen[self._ways[name]]
        match = _LAYER.fullmatch(name)
        if match is None:
            keys = self._norm(_FINAL, stream + output)
        elif match["part"] in _OUTPUTS:
            keys = inputs
        else:
            norm = "layer_norm1" if match["block"] == "self_attn" else "layer_norm2"
            keys = self._norm(f"{match['encoder']}.text_model.encoder.layers.{match['layer']}.{norm}", stream)
        return keys @ matrix.reshape(matrix.shape[0], -1).T

    def _norm(self, name: str, values: Tensor) -> Tensor:
        weight, bias = (self._base.tensor(f"{name}.{part}").double() for part in ("weight", "bias"))
        return layer_norm(values, values.shape[-1:], weight, bias, _EPS)


def _prompts(backend: Backend, words: Sequence[str]) -> tuple[_Prompts, tuple[str, ...]]:
    kept, texts, spans, unread = [], [], [], []
    for word in words:
        filled = [render(frame, word)[0] for frame in FRAMES]
        try:
            found = [backend.span(text, word, -1) for text in filled]
        except (SubjectNotFoundError, SubjectTruncatedError):
            unread.append(word)
            continue
        kept.append(word)
        texts += filled
        spans += found
    return _Prompts(tuple(kept), tuple(texts), tuple(spans)), tuple(unread)


def _per_word(values: Tensor, words: int) -> Tensor:
    """[words]: mean over the frames of the squared length."""
    return values.square().sum(1).reshape(words, len(FRAMES)).mean(1)


def _table(layer: str, words: Sequence[str], squares: Tensor) -> WordMoves:
    shares: list[float] = squares.sqrt().tolist()
    ranked = sorted(zip(shares, words, strict=True), key=lambda pair: (-pair[0], pair[1]))
    moves = tuple(WordMove(word=word, moved=share) for share, word in ranked)
    return WordMoves(layer=layer, words=moves, median=median(shares))
