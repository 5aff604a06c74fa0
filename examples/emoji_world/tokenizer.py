"""A CLIP tokenizer with the first 6,000 merges of CLIP's published byte-pair list: 6,514 tokens instead of 49,408.

The list (`bpe_simple_vocab_16e6.txt.gz`) is part of the `open_clip_torch` and `clip-anytorch` wheels; nothing else of
them is used.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

from transformers import CLIPTokenizer

from .world import MAX_TOKENS, MERGES, all_captions


def read_merges(source: Path, count: int) -> list[str]:
    """The first merges, from the gzip file itself or from a wheel that contains it."""
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith("bpe_simple_vocab_16e6.txt.gz"))
            data = wheel.read(name)
    else:
        data = source.read_bytes()
    lines = gzip.open(io.BytesIO(data), "rt", encoding="utf-8").read().split("\n")[1 : 1 + count]
    return [line for line in lines if len(line.split()) == 2]


def build_tokenizer(source: Path, folder: Path) -> CLIPTokenizer:
    """Write `vocab.json`, `merges.txt` and the transformers files; every caption must fit into `MAX_TOKENS`."""
    pairs = read_merges(source, MERGES)
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in keep] + [chr(256 + i) for i in range(256 - len(keep))]
    tokens = letters + [letter + "</w>" for letter in letters] + [pair.replace(" ", "") for pair in pairs]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False), "utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n", "utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
    longest = max(len(ids) for ids in tokenizer(list(all_captions()))["input_ids"])
    if longest > MAX_TOKENS:
        raise ValueError(f"a caption needs {longest} tokens, more than {MAX_TOKENS}")
    tokenizer.save_pretrained(folder)
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    for leaked in ("is_local", "local_files_only", "backend"):
        config.pop(leaked, None)
    config_path.write_text(json.dumps(config, indent=2) + "\n")
    return tokenizer


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer written by `build_tokenizer`."""
    return CLIPTokenizer.from_pretrained(folder)
