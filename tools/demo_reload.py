"""Evaluate a saved adapter, and the merged model, with transformers and PEFT alone, like anyone who downloads them.

    python tools/demo_reload.py MODEL ADAPTER MERGED DATA.jsonl --max-length 256

Nothing of this project is imported. Prints the mean loss on the assistant's tokens as JSON, without and with the
adapter: on the model as it is (`plain`), and with the weights of its adapted layers rounded to 4 bits, as they were
in training (`rounded`), computed in bfloat16 as there; that of the merged model (`merged`), and its `answer` to the
first `question`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = -100

Example = tuple[torch.Tensor, torch.Tensor]


def _examples(data: Path, tokenizer: Any, max_length: int) -> Iterator[Example]:
    """`(input ids, labels)` of each conversation, both `(1, length)`; the user's tokens are masked from the labels."""
    for line in data.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        question = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([encoding["input_ids"][:max_length]])
        ends = torch.tensor([[end for _, end in encoding["offset_mapping"][:max_length]]])
        yield ids, ids.masked_fill(ends <= len(question), IGNORED)


@torch.inference_mode()
def _mean_loss(model: torch.nn.Module, examples: list[Example]) -> float:
    """Mean over examples, as the trainer of transformers evaluates in batches of one."""
    total = 0.0
    for ids, labels in examples:
        logits, targets = model(input_ids=ids).logits[0, :-1], labels[0, 1:]
        total += functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED).item()
    return total / len(examples)


def _losses(model: PeftModel, examples: list[Example]) -> dict[str, float]:
    with model.disable_adapter():
        base = _mean_loss(model, examples)
    return {"base": base, "adapter": _mean_loss(model, examples)}


@torch.no_grad()
def _round_adapted(model: PeftModel) -> None:
    """Round the weight under every adapter to 4 bits: NF4, from bfloat16, as in training."""
    for name, parameter in model.named_parameters():
        if name.endswith("base_layer.weight"):
            packed, state = quantize_4bit(parameter.to(torch.bfloat16), quant_type="nf4", compress_statistics=True)
            parameter.copy_(dequantize_4bit(packed, state))


@torch.inference_mode()
def _answer(model: Any, tokenizer: Any, question: str) -> str:
    """The answer of `model` to `question`, at most 48 tokens."""
    turns = [{"role": "user", "content": question}]
    given = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**given, max_new_tokens=48, do_sample=False)
    text: str = tokenizer.decode(said[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the base model.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    merged: Annotated[Path, typer.Argument(help="Folder of the base model with the adapter merged into it.")],
    data: Annotated[Path, typer.Argument(help='JSONL file of {"messages"} that end with the assistant.')],
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a conversation; the rest is cut off.")] = 256,
) -> None:
    """Evaluate a saved adapter, and the merged model, with transformers and PEFT alone."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    examples = list(_examples(data, tokenizer, max_length))
    plain = _losses(adapted, examples)
    _round_adapted(adapted)
    # As in training, where a small adapter's part is rounded away when it is added: 0.02 of the loss after few steps.
    adapted.to(torch.bfloat16)
    found: dict[str, Any] = {"plain": plain, "rounded": _losses(adapted, examples)}
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, trust_remote_code=False).eval()
    found["merged"] = _mean_loss(whole, examples)
    found["question"] = json.loads(data.read_text(encoding="utf-8").splitlines()[0])["messages"][0]["content"]
    found["answer"] = _answer(whole, AutoTokenizer.from_pretrained(merged, trust_remote_code=False), found["question"])
    typer.echo(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
