"""Conversations through the tokenizer's chat template, with the part of the assistant marked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias, cast

from surgery.finetune.records import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Span", "encode_marked", "has_generation_markers", "render_conversation"]

Span: TypeAlias = tuple[int, int]

_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def has_generation_markers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template itself says what the assistant writes: `{% generation %}` blocks."""
    return bool(tokenizer.chat_template) and bool(_GENERATION_BLOCK.search(tokenizer.get_chat_template()))


def encode_marked(record: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and 1 for each token inside a `{% generation %}` block.

    Raises `DataError` if the template refuses the messages.
    """
    with _template_errors(record):
        encoding = tokenizer.apply_chat_template(
            _dicts(record, len(record.messages)),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    marked = cast("Mapping[str, list[int]]", encoding)
    return marked["input_ids"], marked["assistant_masks"]


def render_conversation(record: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[str, tuple[Span, ...]]:
    """A conversation as text, and the character range of each assistant turn, for a template without markers.

    What the template writes before an answer (the generation prompt) is left out of its range where the
    template renders answers after it unchanged; otherwise the turn's header is part of the range. Raises
    `DataError` if the template refuses the messages, or renders a turn differently once later turns follow.
    """
    text = _render(record, tokenizer, len(record.messages))
    turns = [index for index, message in enumerate(record.messages) if message.role == "assistant"]
    return text, tuple(_span(record, tokenizer, turn, text) for turn in turns)


def _span(record: Conversation, tokenizer: PreTrainedTokenizerBase, turn: int, text: str) -> Span:
    start = _prefix(text, _render(record, tokenizer, turn, add_generation_prompt=True))
    if start is None:
        start = _prefix(text, _render(record, tokenizer, turn))
    is_last = turn + 1 == len(record.messages)
    stop = len(text) if is_last else _prefix(text, _render(record, tokenizer, turn + 1))
    if start is None or stop is None or start >= stop:
        raise record.at.error(
            f"the chat template renders messages[{turn}] differently once later turns follow, so its tokens "
            "cannot be told apart; split the conversation so that its last turn is the only assistant turn"
        )
    return start, stop


def _prefix(text: str, prefix: str) -> int | None:
    return len(prefix) if text.startswith(prefix) else None


def _render(
    record: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The first `count` messages as text."""
    with _template_errors(record):
        rendered = tokenizer.apply_chat_template(
            _dicts(record, count), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    return cast("str", rendered)


def _dicts(record: Conversation, count: int) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in record.messages[:count]]


@contextmanager
def _template_errors(record: Conversation) -> Iterator[None]:
    """Turn what a template raises, often on purpose, into an error about the record."""
    # Imported here: jinja2 serves chat templates alone, and text data does without it.
    from jinja2 import TemplateError

    try:
        yield
    except TemplateError as error:
        raise record.at.error(f"the chat template refuses these messages: {error}") from error
