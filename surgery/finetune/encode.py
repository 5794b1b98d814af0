"""Records into samples: token ids, and for each token whether it is learnt.

Text and completions are ended with the tokenizer's end-of-sequence token. A completion is tokenized together
with its prompt, as the model will meet it, and a token is learnt if it covers any character of the
completion. Conversations go through the chat template; only assistant turns are learnt.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.errors import ConfigError
from surgery.finetune.conversation import Span, encode_marked, has_generation_markers, render_conversation
from surgery.finetune.records import Conversation, Record, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Sample", "encode_records"]

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
        """How many tokens count in the loss; the first of a sequence, predicted from nothing, never does."""
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

    Raises `ConfigError` for a tokenizer that cannot do what the records need (character offsets, an
    end-of-sequence token, a chat template), and `DataError` for a conversation that the chat template
    refuses.
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
            yield Sample(
                ids=array("i", ids[:max_length]),
                learnt=array("b", learnt[:max_length]),
                cut=max(0, len(ids) - max_length),
            )


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
