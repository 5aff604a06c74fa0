"""What kind of edit a pattern of changed tensors looks like. A guess, and worded as one.

Methods leave traces in *where* they write and in the *rank* of what they write: a closed form writes as many directions
as it was given prompts, and in cross-attention the same input directions in every layer, since all layers read the same
text embeddings; gradient descent fills the spectrum; a merged adapter has one low rank and directions of its own in
every layer. Where the evidence fits no known trace, or more than one, that is the answer.

Sources: the edit sites of Diff-QuickFix (arXiv 2310.13730), TIME (2303.08084), UCE (2308.14761), LocoEdit (2405.01008),
ESD (2303.07345), concept ablation (2303.13516), ReFACT (2306.00738), EMCID (2403.13807), EmbEdit (2412.03400).
Limits: anybody can write any change anywhere; a trace is no proof, and combinations are not told apart.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from diffedit.audit.records import TensorDiff

# Share of the change that lies in common input directions; above it, layers were written from the same inputs.
SHARED = 0.9
MANY = 20

_CROSS = re.compile(r"unet\..+\.attn2\.to_([kv])\.weight")
_TEXT_OUT = re.compile(r"text_encoder(?:_2)?\..+\.self_attn\.out_proj\.weight")
_TEXT_MLP = re.compile(r"text_encoder(?:_2)?\..+\.mlp\.fc2\.weight")
_TOKENS = re.compile(r"text_encoder(?:_2)?\..+\.token_embedding\.weight")


def shared_inputs(inputs: Sequence[Tensor]) -> float | None:
    """How much of the layers' changes acts on common input directions, 0 to 1.

    Args:
        inputs: `Change.inputs` of layers that read the same inputs, [r_l, d_in] each.

    Returns:
        With r the highest of the ranks and P the projector on the r main directions of all layers together, the mean
        over layers of |inputs P|^2. `None` for fewer than two layers of one width.
    """
    if len(inputs) < 2 or len({item.shape[1] for item in inputs}) != 1:
        return None
    rank = max(item.shape[0] for item in inputs)
    _, _, right = torch.linalg.svd(torch.cat(list(inputs)), full_matrices=False)
    return sum(float((item @ right[:rank].T).square().sum()) for item in inputs) / len(inputs)


def guess(tensors: Sequence[TensorDiff], *, compared: int, cross_layers: int, shared: float | None) -> tuple[str, ...]:
    """What it looks like, and the evidence, one sentence each.

    Args:
        tensors: all that differ.
        compared: number of tensors that were compared.
        cross_layers: number of cross-attention key and value layers in the base.
        shared: from `shared_inputs`, for the changed ones of these.
    """
    if not tensors:
        return ("The weights are the same.",)
    if any(tensor.state == "not finite" for tensor in tensors):
        return ("Some weights are NaN or infinite: a broken file or a failed edit.",)
    if all(tensor.state == "rounding" for tensor in tensors):
        dtypes = sorted({f"{tensor.base_dtype} -> {tensor.edited_dtype}" for tensor in tensors})
        return ("Rounding only: the same model in another precision, no edit.", f"Stored as {', '.join(dtypes)}.")
    real = [tensor for tensor in tensors if not tensor.is_noise]
    if not real:
        return (
            "Noise only: this looks like repeated rounding (a conversion, an adapter fused and unfused), not an edit.",
        )
    return (_pattern(real, compared, cross_layers, shared), *_evidence(real, shared))


def _pattern(real: Sequence[TensorDiff], compared: int, cross_layers: int, shared: float | None) -> str:
    low, high = all(tensor.is_low for tensor in real), all(tensor.is_high for tensor in real)
    one = len(real) == 1
    if _all(real, _TEXT_OUT) and low:
        where = "one text-encoder attention output" if one else f"{len(real)} text-encoder attention outputs"
        return f"This looks like a closed-form edit of {where} (as Diff-QuickFix and diffedit make)."
    if _all(real, _TEXT_MLP) and low:
        if one and real[0].rank == 1:
            return "This looks like a rank-one edit of one text-encoder MLP (as ReFACT makes)."
        kin = (
            "a closed-form edit of one text-encoder MLP" if one else "a closed-form edit spread over text-encoder MLPs"
        )
        return f"This looks like {kin} (as EMCID makes)."
    if _all(real, _CROSS):
        return _cross_attention(real, low, high, cross_layers, shared)
    if _all(real, _TOKENS):
        rows, of = sum(tensor.rows for tensor in real), sum(tensor.shape[0] for tensor in real)
        if rows * 10 <= of:
            return f"This looks like an edit of {rows} of {of} token embeddings (as EmbEdit makes)."
    matrices = [tensor for tensor in real if tensor.rank is not None]
    if len(matrices) == len(real) > 1 and low:
        return "This looks like a low-rank adapter (LoRA) merged into the weights."
    mostly_high = bool(matrices) and sum(tensor.is_high for tensor in matrices) * 10 >= 8 * len(matrices)
    if mostly_high and all(".attn2." in tensor.name for tensor in real):
        return "This looks like training of the UNet's cross-attention (as ESD-x does)."
    if mostly_high and len(real) >= min(MANY, max(2, compared // 4)):
        parts = " and ".join(sorted({tensor.component for tensor in real}))
        if parts == "unet" and not any(".attn2." in tensor.name for tensor in real):
            return "This looks like a UNet trained outside of its cross-attention (as ESD-u does)."
        return f"This looks like fine-tuning of the {parts}: many tensors, nearly full rank."
    return "No known trace: the changes fit no method that is looked for, or more than one."


def _cross_attention(real: Sequence[TensorDiff], low: bool, high: bool, cross_layers: int, shared: float | None) -> str:
    sides = {match[1] for tensor in real if (match := _CROSS.fullmatch(tensor.name))}
    expected = cross_layers if sides == {"k", "v"} else cross_layers // 2
    what = {"k": "keys", "v": "values"}
    which = " and ".join(what[side] for side in sorted(sides))
    extent = "all" if len(real) == expected else f"{len(real)} of {expected}"
    where = f"{extent} cross-attention {which}"
    if high:
        return f"This looks like training of {where} (as ESD-x and concept ablation do)."
    if low and shared is not None and shared < SHARED:
        return f"This looks like a low-rank adapter (LoRA) merged into {where}."
    if low:
        kin = "UCE or TIME" if extent == "all" else "LocoEdit"
        return f"This looks like a closed-form edit of {where} (as {kin} makes)."
    return f"Changes of {where}, of middling rank: a closed form with many prompts, or training."


def _evidence(real: Sequence[TensorDiff], shared: float | None) -> tuple[str, ...]:
    parts = Counter(tensor.component for tensor in real)
    lines = ["Changed: " + ", ".join(f"{count} in {name}" for name, count in sorted(parts.items())) + "."]
    ranks = [tensor.rank for tensor in real if tensor.rank is not None]
    if ranks:
        bound = "at least " if any(tensor.rank_is_bound for tensor in real) else ""
        full = max(tensor.full_rank or 0 for tensor in real)
        span = str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        lines.append(f"Rank {bound}{span}, of at most {full}.")
    norms = [tensor.relative_norm for tensor in real if tensor.relative_norm is not None]
    if norms:
        span = f"{min(norms):.2%}" if len(norms) == 1 else f"{min(norms):.2%} to {max(norms):.2%}"
        lines.append(f"Size {span} of the weight.")
    if shared is not None:
        lines.append(f"{shared:.0%} of the cross-attention change acts on common input directions.")
    return tuple(lines)


def _all(tensors: Sequence[TensorDiff], pattern: re.Pattern[str]) -> bool:
    return all(pattern.fullmatch(tensor.name) for tensor in tensors)
