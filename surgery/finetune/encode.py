"""Records into samples: token ids, and for each token whether it is learnt.

Text and completions are ended with the tokenizer's end-of-sequence token. A completion is tokenized together
with its prompt, as the model will meet it, and a token is learnt if it covers any character of the
completion. Conversations go through the chat template; only assistant turns are learnt.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from surgery.errors import ConfigError, DataError
from surgery.finetune.records import Conversation, Record, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Sample", "encode_records"]

Span: TypeAlias = tuple[int, int]

#: Characters from which on a message is looked for in the rendered text; a shorter one could be there by chance.
TELLING = 24

_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def has_generation_markers(record: Conversation, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template itself says what the assistant writes: `{% generation %}` blocks.

    A tokenizer may have a template of its own for conversations with tools.
    """
    tools: Any = list(record.tools) or None
    with _template_errors(record):
        return bool(_GENERATION_BLOCK.search(tokenizer.get_chat_template(tools=tools)))


def encode_marked(record: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and 1 for each token inside a `{% generation %}` block.

    Raises `DataError` if the template refuses the messages, or does not show one, or the tools.
    """
    _check_all_is_shown(record, tokenizer, _as_text(record, tokenizer))
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    marked = _apply_template(record, tokenizer, **options)
    return marked["input_ids"], marked["assistant_masks"]


def render_conversation(record: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[str, tuple[Span, ...]]:
    """A conversation as text, and the character range of each assistant turn, for a template without markers.

    What the template writes before an answer (the generation prompt) is left out of its range where the
    template renders answers after it unchanged; otherwise the turn's header is part of the range. Raises
    `DataError` if the template refuses the messages, does not show one, or the tools, or renders a turn differently
    once later turns follow.
    """
    text = _as_text(record, tokenizer)
    _check_all_is_shown(record, tokenizer, text)
    turns = [index for index, message in enumerate(record.messages) if message.role == "assistant"]
    return text, tuple(_span(record, tokenizer, turn, text) for turn in turns)


def _check_all_is_shown(record: Conversation, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Refuse what the template leaves out without a word: many know nothing of tools, or of some roles.

    text: the whole `record` as rendered.
    """
    for index, message in enumerate(record.messages):
        if not _is_shown(record, tokenizer, index, text):
            raise record.at.error(
                f"the chat template of the checkpoint does not show messages[{index}], of the role {message.role!r}, "
                "to the model, or not to its end; remove that message, or give the checkpoint a chat_template.jinja "
                "that renders it"
            )
    if record.tools and text == _as_text(replace(record, tools=()), tokenizer):
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
        return _as_text(changed, tokenizer) != text
    except DataError:
        return True


def _span(record: Conversation, tokenizer: PreTrainedTokenizerBase, turn: int, text: str) -> Span:
    start = _prefix_length(text, _as_text(record, tokenizer, turn, prompt=True))
    if start is None:
        start = _prefix_length(text, _as_text(record, tokenizer, turn))
    is_last = turn + 1 == len(record.messages)
    stop = len(text) if is_last else _prefix_length(text, _as_text(record, tokenizer, turn + 1))
    if start is None or stop is None or start >= stop:
        raise record.at.error(
            f"the chat template renders messages[{turn}] differently once later turns follow, so its tokens "
            "cannot be told apart; split the conversation so that its last turn is the only assistant turn"
        )
    return start, stop


def _prefix_length(text: str, prefix: str) -> int | None:
    return len(prefix) if text.startswith(prefix) else None


def _as_text(
    record: Conversation, tokenizer: PreTrainedTokenizerBase, count: int | None = None, *, prompt: bool = False
) -> str:
    """The first `count` messages, or all, as text, with the generation prompt of the next one if `prompt`."""
    text: str = _apply_template(record, tokenizer, count, tokenize=False, add_generation_prompt=prompt)
    return text


def _apply_template(
    record: Conversation, tokenizer: PreTrainedTokenizerBase, count: int | None = None, **options: Any
) -> Any:
    messages = [{"role": message.role, "content": message.content} for message in record.messages[:count]]
    tools: Any = list(record.tools) or None
    with _template_errors(record):
        return tokenizer.apply_chat_template(messages, tools=tools, **options)


@contextmanager
def _template_errors(record: Conversation) -> Iterator[None]:
    """Turn what a template raises, often on purpose, into an error about the record."""
    try:
        yield
    # A template is a program: beside jinja's errors it can raise any of Python's.
    except Exception as error:
        raise record.at.error(f"the chat template refuses these messages: {error}") from error


# Character offsets are Python tuples; a chunk bounds how many exist at once.
_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence of tokens, and for each of them 1 if it is learnt, else 0; `cut` tokens of its end are left out."""

    ids: array[int]
    learnt: array[int]
    cut: int = 0

    @property
    def targets(self) -> int:
        """Number of tokens that count in the loss; the first of a sequence never does."""
        return sum(self.learnt[1:])


@dataclass(frozen=True, kw_only=True)
class _Rendered:
    """A record as one string, and the character ranges that are learnt."""

    text: str
    spans: tuple[Span, ...]
    is_chat: bool


def encode_records(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Iterator[Sample]:
    """One sample a record, in order, cut off after `max_length` tokens.

    Raises `ConfigError` for a tokenizer that lacks what the records need (character offsets, an end-of-sequence token,
    a chat template), and `DataError` for a conversation that the chat template refuses.
    """
    _check_tokenizer(tokenizer, records)
    for start in range(0, len(records), _CHUNK):
        chunk = records[start : start + _CHUNK]
        encoded: dict[int, tuple[list[int], list[int]]] = {}
        rendered: dict[int, _Rendered] = {}
        for index, record in enumerate(chunk):
            if isinstance(record, Conversation) and has_generation_markers(record, tokenizer):
                encoded[index] = encode_marked(record, tokenizer)
            else:
                rendered[index] = _render(record, tokenizer)
        encoded |= _tokenize({index: item for index, item in rendered.items() if item.is_chat}, tokenizer)
        encoded |= _tokenize({index: item for index, item in rendered.items() if not item.is_chat}, tokenizer)
        for index in range(len(chunk)):
            ids, learnt = encoded[index]
            kept, flags = array("i", ids[:max_length]), array("b", learnt[:max_length])
            yield Sample(ids=kept, learnt=flags, cut=max(0, len(ids) - max_length))


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]) -> None:
    if not tokenizer.is_fast:
        raise ConfigError(
            f"expected a tokenizer with character offsets (a tokenizer.json), found "
            f"{type(tokenizer).__name__}; save the tokenizer in its fast form beside the checkpoint"
        )
    if not tokenizer.chat_template and any(isinstance(record, Conversation) for record in records):
        raise ConfigError(
            'the data has {"messages"}, but the tokenizer of the checkpoint has no chat template; add a '
            'chat_template.jinja to the checkpoint, or give {"prompt", "completion"} data'
        )
    if tokenizer.eos_token_id is None and any(not isinstance(record, Conversation) for record in records):
        raise ConfigError(
            "the tokenizer of the checkpoint has no end-of-sequence token, so text and completions could "
            'not be ended; set "eos_token" in tokenizer_config.json'
        )


def _render(record: Record, tokenizer: PreTrainedTokenizerBase) -> _Rendered:
    if isinstance(record, Conversation):
        text, spans = render_conversation(record, tokenizer)
        return _Rendered(text=text, spans=spans, is_chat=True)
    if isinstance(record, Text):
        return _Rendered(text=record.text, spans=((0, len(record.text)),), is_chat=False)
    text = record.prompt + record.completion
    return _Rendered(text=text, spans=((len(record.prompt), len(text)),), is_chat=False)


def _tokenize(
    rendered: dict[int, _Rendered], tokenizer: PreTrainedTokenizerBase
) -> dict[int, tuple[list[int], list[int]]]:
    """Ids and learnt flags for each rendered record; all of them chats, or none of them."""
    if not rendered:
        return {}
    is_chat = next(iter(rendered.values())).is_chat
    encoding = tokenizer(
        [item.text for item in rendered.values()],
        # A chat template writes its own special tokens, the one that begins the sequence included.
        add_special_tokens=not is_chat,
        return_offsets_mapping=True,
        return_attention_mask=False,
        # A tokenizer may have been saved with truncation switched on; ours comes last, after the end token.
        truncation=False,
        verbose=False,
    )
    encoded = {}
    for index, ids, offsets in zip(rendered, encoding["input_ids"], encoding["offset_mapping"], strict=True):
        learnt = _learnt(offsets, rendered[index].spans)
        if is_chat:
            encoded[index] = ids, learnt
            continue
        again = _begun_again(ids, offsets)
        encoded[index] = _ended(_without(ids, again), _without(learnt, again), tokenizer.eos_token_id)
    return encoded


def _begun_again(ids: Sequence[int], offsets: Sequence[Span]) -> slice:
    """The tokens of a text that repeat those which the tokenizer has put before it, such as `<s>`."""
    added = next((place for place, (start, stop) in enumerate(offsets) if start != stop), len(ids))
    for count in range(added, 0, -1):
        if ids[added - count : added] == ids[added : added + count]:
            return slice(added, added + count)
    return slice(0, 0)


def _without(values: list[int], part: slice) -> list[int]:
    return [*values[: part.start], *values[part.stop :]]


def _learnt(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """1 for each token that covers a character of any span; special tokens cover none."""
    return [int(any(start < span[1] and span[0] < stop for span in spans)) for start, stop in offsets]


def _ended(ids: list[int], learnt: list[int], eos: int) -> tuple[list[int], list[int]]:
    """The sequence with one end token, learnt, whether or not the tokenizer has already added it."""
    body = len(ids) - 1 if ids and ids[-1] == eos else len(ids)
    return [*ids[:body], eos], [*learnt[:body], 1]
