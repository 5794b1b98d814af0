"""Conversations through the tokenizer's chat template, with the part of the assistant marked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from surgery.finetune.records import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Span", "encode_marked", "has_generation_markers", "render_conversation"]

Span: TypeAlias = tuple[int, int]

_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def has_generation_markers(record: Conversation, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template itself says what the assistant writes: `{% generation %}` blocks.

    A tokenizer may have a template of its own for conversations with tools.
    """
    with _template_errors(record):
        return bool(_GENERATION_BLOCK.search(tokenizer.get_chat_template(tools=cast("Any", _tools(record)))))


def encode_marked(record: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and 1 for each token inside a `{% generation %}` block.

    Raises `DataError` if the template refuses the messages, or does not show the tools.
    """
    _check_tools_are_shown(record, tokenizer)
    with _template_errors(record):
        encoding = tokenizer.apply_chat_template(
            _dicts(record, len(record.messages)),
            tools=_tools(record),
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
    `DataError` if the template refuses the messages, does not show the tools, or renders a turn differently once
    later turns follow.
    """
    _check_tools_are_shown(record, tokenizer)
    text = _render(record, tokenizer, len(record.messages))
    turns = [index for index, message in enumerate(record.messages) if message.role == "assistant"]
    return text, tuple(_span(record, tokenizer, turn, text) for turn in turns)


def _check_tools_are_shown(record: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
    """Many templates know nothing of tools, and would leave them out without a word."""
    if not record.tools:
        return
    count = len(record.messages)
    if _render(record, tokenizer, count) == _render(replace(record, tools=()), tokenizer, count):
        raise record.at.error(
            'the chat template of the checkpoint does not show tools to the model; remove "tools", or give the '
            "checkpoint a chat_template.jinja that renders them"
        )


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
            _dicts(record, count),
            tools=_tools(record),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    return cast("str", rendered)


def _dicts(record: Conversation, count: int) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in record.messages[:count]]


def _tools(record: Conversation) -> list[dict[str, Any] | Callable[..., Any]] | None:
    return list(record.tools) or None


@contextmanager
def _template_errors(record: Conversation) -> Iterator[None]:
    """Turn what a template raises, often on purpose, into an error about the record."""
    try:
        yield
    # A template is a program: beside jinja's errors it can raise any of Python's.
    except Exception as error:
        raise record.at.error(f"the chat template refuses these messages: {error}") from error
