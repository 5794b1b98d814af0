"""Conversations through the tokenizer's chat template, with the part of the assistant marked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from surgery.errors import DataError
from surgery.finetune.records import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Span", "encode_marked", "has_generation_markers", "render_conversation"]

Span: TypeAlias = tuple[int, int]

#: Characters from which on a message is looked for in the rendered text; a shorter one could be there by chance.
TELLING = 24

_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def has_generation_markers(record: Conversation, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template itself says what the assistant writes: `{% generation %}` blocks.

    A tokenizer may have a template of its own for conversations with tools.
    """
    with _template_errors(record):
        return bool(_GENERATION_BLOCK.search(tokenizer.get_chat_template(tools=cast("Any", _tools(record)))))


def encode_marked(record: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and 1 for each token inside a `{% generation %}` block.

    Raises `DataError` if the template refuses the messages, or does not show one, or the tools.
    """
    _check_all_is_shown(record, tokenizer, _render(record, tokenizer, len(record.messages)))
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
    `DataError` if the template refuses the messages, does not show one, or the tools, or renders a turn differently
    once later turns follow.
    """
    text = _render(record, tokenizer, len(record.messages))
    _check_all_is_shown(record, tokenizer, text)
    turns = [index for index, message in enumerate(record.messages) if message.role == "assistant"]
    return text, tuple(_span(record, tokenizer, turn, text) for turn in turns)


def _check_all_is_shown(record: Conversation, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Many templates know nothing of tools, or of some roles, and would leave them out without a word.

    text: the whole `record` as rendered.
    """
    for index, message in enumerate(record.messages):
        if not _is_shown(record, tokenizer, index, text):
            raise record.at.error(
                f"the chat template of the checkpoint does not show messages[{index}], of the role {message.role!r}, "
                "to the model, or not to its end; remove that message, or give the checkpoint a chat_template.jinja "
                "that renders it"
            )
    if record.tools and text == _render(replace(record, tools=()), tokenizer, len(record.messages)):
        raise record.at.error(
            'the chat template of the checkpoint does not show tools to the model; remove "tools", or give the '
            "checkpoint a chat_template.jinja that renders them"
        )


def _is_shown(record: Conversation, tokenizer: PreTrainedTokenizerBase, index: int, text: str) -> bool:
    """Whether the content of a message decides what `text` is: by finding it there, or else by adding a word to it.

    A template that parses the content, or takes parts of it out, still shows the word, or refuses it.
    """
    message = record.messages[index]
    content = message.content.strip()
    if len(content) >= TELLING and text.count(content) >= sum(m.content.count(content) for m in record.messages):
        return True
    longer = replace(message, content=f"{message.content} seen")
    changed = replace(record, messages=(*record.messages[:index], longer, *record.messages[index + 1 :]))
    try:
        return _render(changed, tokenizer, len(record.messages)) != text
    except DataError:
        return True


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
