"""Two small CLIP models trained on the same world, but apart: the generator's text encoder, and the scorer.

Both are stock transformers `CLIPModel`s. The loss is CLIP's, with two changes that a closed world allows: every caption
of a batch that is *true* of a picture counts as a match (not only its own), and the pictures are also named among plain
prompts of each kind. The scorer has another seed and another architecture, and also sees blur, noise, colour shifts and
autoencoder copies.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from torch.nn.functional import log_softmax
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from .augment import Copies, augmented
from .common import log, train
from .pictures import Pictures
from .tokenizer import load_tokenizer
from .world import (
    BACKGROUNDS,
    CATEGORIES,
    MAX_TOKENS,
    OBJECTS,
    PIXELS,
    STYLES,
    Caption,
    category_of,
    compose,
    random_caption,
)

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # pictures are handled in [-1, 1] throughout
MODELS: dict[str, dict[str, dict[str, int]]] = {
    "clip": {
        "text": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4},
        "vision": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "patch_size": 16,
        },
    },
    "scorer": {
        "text": {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3, "num_attention_heads": 6},
        "vision": {
            "hidden_size": 144,
            "intermediate_size": 432,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "patch_size": 16,
        },
    },
}


def make_clip(kind: str, tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained model of one of the two architectures."""
    end = tokenizer.eos_token_id
    text = {
        **MODELS[kind]["text"],
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "hidden_act": "quick_gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": end,
        "pad_token_id": end,
        "projection_dim": 128,
    }
    vision = {**MODELS[kind]["vision"], "image_size": PIXELS, "hidden_act": "quick_gelu", "projection_dim": 128}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids, padded to the full length as the pipeline does."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def shortened(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids cut after the longest text: with causal attention the padding changes nothing before it."""
    return tokenizer(texts, padding=True, return_tensors="pt").input_ids


def _embedding(output: object) -> torch.Tensor:
    value = getattr(output, "pooler_output", output)
    return value / value.norm(dim=-1, keepdim=True)


def text_vectors(clip: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Unit vectors of token ids (transformers 4 and 5)."""
    return _embedding(clip.get_text_features(input_ids=ids))


def image_vectors(clip: CLIPModel, pictures: torch.Tensor) -> torch.Tensor:
    """Unit vectors of pictures in [-1, 1]."""
    return _embedding(clip.get_image_features(pixel_values=pictures))


def agrees(caption: Caption, name: str, style: str, ground: str) -> bool:
    """Whether everything the caption says is true of the picture."""
    return (
        caption.subject in (None, name, category_of(name))
        and caption.style in (None, style)
        and caption.background in (None, ground)
    )


def prompts_of(rng: Random) -> list[tuple[list[str], list[str | None]]]:
    """Prompts of every kind with one random template each: (texts, the value each text stands for)."""
    kinds: list[tuple[list[str], list[str | None]]] = []
    head = rng.randrange(6)
    for words in (OBJECTS, list(CATEGORIES)):
        kinds.append(([compose(word, head, None, None).text for word in words], list(words)))
    form, bare = rng.randrange(6), rng.randrange(5)
    kinds.append(([compose(None, bare, word, None, (form, 0)).text for word in STYLES], list(STYLES)))
    kinds.append(([compose(None, bare, None, word, (0, form)).text for word in BACKGROUNDS], list(BACKGROUNDS)))
    return kinds


def clip_loss(
    clip: CLIPModel, tokenizer: CLIPTokenizer, pictures: torch.Tensor, facts: list[tuple[str, str, str]], rng: Random
) -> torch.Tensor:
    """Multi-positive contrastive loss in both directions plus the naming losses."""
    captions = [random_caption(rng, *fact, empty=0.0) for fact in facts]
    kinds = prompts_of(rng)
    said = torch.cat(
        [
            text_vectors(clip, ids)
            for ids in (
                shortened(tokenizer, [c.text for c in captions]),
                shortened(tokenizer, [text for texts, _ in kinds for text in texts]),
            )
        ]
    )
    logits = clip.logit_scale.exp().clamp(max=100) * image_vectors(clip, pictures) @ said.T
    size = len(facts)
    match = torch.tensor([[agrees(c, *fact) for c in captions] for fact in facts]).float()
    pairs = logits[:, :size]
    loss = -(log_softmax(pairs, 1) * match / match.sum(1, keepdim=True)).sum(1).mean()
    loss = loss - (log_softmax(pairs, 0) * match / match.sum(0, keepdim=True)).sum(0).mean()
    start = size
    for (kind, values), attribute in zip(kinds, (0, None, 1, 2), strict=True):
        part = logits[:, start : start + len(kind)]
        start += len(kind)
        wanted = [category_of(fact[0]) if attribute is None else fact[attribute] for fact in facts]
        rows = [i for i, value in enumerate(wanted) if value is not None]
        target = torch.tensor([values.index(wanted[i]) for i in rows])
        loss = loss + 0.5 * torch.nn.functional.cross_entropy(part[rows], target)
    return loss


def named(labels: list[tuple[int, int, int]]) -> list[tuple[str, str, str]]:
    """Label indices -> words."""
    styles, grounds = list(STYLES), list(BACKGROUNDS)
    return [(OBJECTS[o], styles[s], grounds[b]) for o, s, b in labels]


def train_clip(
    kind: str, work: Path, minutes: float, seed: int, batch: int = 96, copies: Copies | None = None
) -> CLIPModel:
    """Train `clip` or, with autoencoder copies and disturbances, `scorer` (resumable); write it to `<work>/<kind>`."""
    tokenizer, source, rng = load_tokenizer(work / "tokenizer"), Pictures.load(work), Random(seed)
    torch.manual_seed(seed)
    clip = make_clip(kind, tokenizer)
    log.info("%s: %.2fM parameters", kind, sum(p.numel() for p in clip.parameters()) / 1e6)

    def loss_of(step: int) -> torch.Tensor:
        pictures, labels = source.batch(rng, batch)
        if copies is not None:
            pictures = augmented(pictures, rng, copies.of(labels))
        return clip_loss(clip, tokenizer, pictures, named(labels), rng)

    def report(step: int) -> None:
        pictures, labels = source.batch(fresh := Random(999), 400)
        if copies is not None:
            pictures = augmented(pictures, fresh, copies.of(labels))
        log.info("%s: step %d, zero-shot %s", kind, step, score(clip.eval(), tokenizer, pictures, named(labels)))

    train(
        kind,
        work,
        clip,
        loss_of,
        steps=100_000,
        minutes=minutes,
        rate=1e-3 if kind == "clip" else 1.5e-3,
        decay=0.05,
        average=0.995,
        report=report,
        report_every=200,
    )
    report(0)
    clip.save_pretrained(work / kind)
    return clip


@torch.no_grad()
def score(
    clip: CLIPModel, tokenizer: CLIPTokenizer, pictures: torch.Tensor, facts: list[tuple[str, str, str]]
) -> dict[str, float]:
    """Share of pictures whose object, category, style and background are named first."""
    seen = image_vectors(clip, pictures)
    result = {}
    for (texts, values), kind in zip(prompts_of(Random(0)), ("object", "category", "style", "background"), strict=True):
        best = (seen @ text_vectors(clip, tokens(tokenizer, texts)).T).argmax(1).tolist()
        wanted = [
            {"object": f[0], "category": category_of(f[0]), "style": f[1], "background": f[2]}[kind] for f in facts
        ]
        hits = [values[b] == w for b, w in zip(best, wanted, strict=True) if w is not None]
        result[kind] = round(sum(hits) / max(1, len(hits)), 4)
    return result


def text_encoder_of(clip: CLIPModel) -> CLIPTextModel:
    """The text tower as the pipeline's `CLIPTextModel`, whichever layout this transformers version uses."""
    encoder = CLIPTextModel(clip.config.text_config)
    nested = {f"text_model.{k}": v for k, v in clip.text_model.state_dict().items()}
    flat = {k.removeprefix("text_model."): v for k, v in nested.items()}
    own = set(encoder.state_dict())
    encoder.load_state_dict(nested if set(nested) & own else flat)
    return encoder.eval()
