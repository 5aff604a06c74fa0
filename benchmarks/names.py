"""Ten thousand made-up names, the same ones in every run, and a byte-pair vocabulary that cuts them as CLIP's would.

Real vocabularies cannot be downloaded here, and what matters to a benchmark is how names fall into tokens: two words,
some frequent enough to be one token, others cut into two or three. The vocabulary is trained on the names themselves.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEMPLATES = ("{}", "photo of {}", "image of {}", "picture of {}")

_ONSETS = (
    "b",
    "br",
    "c",
    "ch",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "sh",
    "st",
    "t",
)
_NUCLEI = ("a", "e", "i", "o", "u", "ai", "ea", "ie", "ou")
_CODAS = ("", "", "l", "n", "r", "s", "t", "nd", "rt", "ck", "ss")


def names(count: int) -> list[str]:
    """`count` distinct names of two words, at most 100,000."""
    rng = random.Random(0)
    given, family = _words(rng, 2500, (1, 2)), _words(rng, 8000, (2, 3))
    found: dict[str, None] = {}
    while len(found) < count:
        found[f"{rng.choice(given)} {rng.choice(family)}"] = None
    return list(found)


def write_tokenizer(folder: Path) -> Path:
    """A CLIP tokenizer of 12,000 tokens, as the files that transformers reads."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False, False)]
    )
    bpe.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=11_998,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    everyday = ["a photo of a dog", "an image of a cat", "a picture of a painting", "the artist"] * 100
    bpe.train_from_iterator([*names(10_000), *everyday], trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = dict(model["vocab"])
    letters = pre_tokenizers.ByteLevel.alphabet()
    for token in [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]:
        vocab.setdefault(token, len(vocab))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "unk_token": "<|endoftext|>"}
    config |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _words(rng: random.Random, count: int, syllables: tuple[int, int]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        parts = (rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS) for _ in range(rng.randint(*syllables)))
        found["".join(parts).capitalize()] = None
    return list(found)
