"""The files of a tokenizer, as `save_pretrained` of transformers names them; no code among them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

__all__ = ["NAMES", "read_tokenizer", "tokenizer_sizes"]

NAMES = (
    "added_tokens.json",
    "bpe.codes",
    "byte_maps.json",
    "chat_template.jinja",
    "chat_template.json",
    "dict.txt",
    "emoji.json",
    "merges.txt",
    "normalizer.json",
    "prophetnet.tokenizer",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "target.spm",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "word_pronunciation.json",
    "word_shape.json",
)


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """The contents of the files by name; of none of them, with a warning, if one cannot be read."""
    try:
        return {file.name: file.read_bytes() for file in _files(folder)}
    except OSError as error:  # no reason to lose what has been trained
        warnings.warn(f"The tokenizer in {folder} cannot be read, and is left out: {error}", stacklevel=2)
        return {}


def tokenizer_sizes(folder: Path) -> list[int]:
    """Bytes of each of the files."""
    return [file.stat().st_size for file in _files(folder)]


def _files(folder: Path) -> Iterator[Path]:
    return (folder / name for name in NAMES if (folder / name).is_file())
