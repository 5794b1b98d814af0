"""A real tokenizer, small enough to be trained while a test starts: byte-level BPE over a few sentences."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.helpers.models import save_tiny

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: Every byte, a few merges, and three special tokens.
VOCABULARY = 280

#: Turns as `<|role|>content</s>`, rendered alike whether or not more turns follow.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_SENTENCES = ("the cat sat on the mat", "the dog ate the cake", "what does the cat say")


@cache
def _trained() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer


def tiny_tokenizer(
    *, chat_template: str | None = CHAT_TEMPLATE, bos: bool = False, **special: str | None
) -> PreTrainedTokenizerFast:
    """A tokenizer of `VOCABULARY` tokens; with `bos` it begins every sequence by `<s>`."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(_trained().to_str())
    if bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", **special}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{key: value for key, value in names.items() if value is not None}
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def save_with_tokenizer(directory: Path, model_type: str = "llama", *, bos: bool = False, **changes: Any) -> Path:
    """A checkpoint as `save_tiny` makes it, with `tiny_tokenizer` beside the weights."""
    save_tiny(directory, model_type, vocab_size=VOCABULARY, **changes)
    tiny_tokenizer(bos=bos).save_pretrained(directory)
    return directory
