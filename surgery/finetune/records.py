"""Lines of JSONL, checked and typed: one of three shapes a line, and errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from surgery.checkpoint.header import parse_json
from surgery.errors import DataError

__all__ = ["Completion", "Conversation", "Location", "Message", "Record", "Text", "read_records"]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAPES = (frozenset({"text"}), frozenset({"prompt", "completion"}), frozenset({"messages"}))
OPTIONAL = {"messages": "tools"}
EXPECTED = '{"text"}, {"prompt", "completion"} or {"messages"}'
_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Location:
    """Place of a record; `line` is 1-based."""

    path: Path
    line: int

    def error(self, message: str) -> DataError:
        """An error about this line, to be raised."""
        return DataError(f"{self.path}:{self.line}: {message}", path=self.path, line=self.line)


@dataclass(frozen=True, kw_only=True)
class Text:
    """Running text; every token is learnt."""

    text: str
    at: Location


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A prompt, which is only read, and the completion that is learnt."""

    prompt: str
    completion: str
    at: Location


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns of a chat, at least one the assistant's, though not the first; assistant turns are learnt.

    `tools`: what the chat template is told that the assistant may call, JSON objects as they were read.
    """

    messages: tuple[Message, ...]
    at: Location
    tools: tuple[dict[str, Any], ...] = ()


Record: TypeAlias = Text | Completion | Conversation


def read_records(path: Path) -> list[Record]:
    """Every record of a JSONL file, in order; blank lines are passed over.

    Raises `DataError` for a file that cannot be read or holds no record, and for the first line that is not
    UTF-8, not JSON, not an object, or not exactly one of the three shapes. A conversation may have `"tools"`;
    any other key beside those of the shape is refused, since nothing would read it.
    """
    records = [_parse(line, Location(path=path, line=number)) for number, line in _lines(path)]
    if not records:
        raise DataError(
            f"{path}: expected one JSON object a line ({EXPECTED}), found an empty file", path=path, line=None
        )
    return records


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    # Bytes, not text: str.splitlines() and friends also split on U+2028, which JSON allows inside a string.
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(_UTF8_BOM) if number == 1 else line
                if content.strip():
                    yield number, content
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}", path=path) from error


def _parse(line: bytes, at: Location) -> Record:
    try:
        value = parse_json(line)
    except UnicodeDecodeError as error:
        raise at.error(
            f"expected UTF-8, found byte {error.object[error.start]:#04x}; save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise at.error(
            f"not JSON: {error.msg} at column {error.colno}; expected one JSON object a line ({EXPECTED})"
        ) from error
    except ValueError as error:
        raise at.error(f"not a training record: {error}") from error
    if not isinstance(value, dict):
        raise at.error(f"expected a JSON object ({EXPECTED}), found {_kind(value)}")
    return _record(value, at)


def _record(value: dict[str, Any], at: Location) -> Record:
    present = [shape for shape in SHAPES if shape <= value.keys()]
    if len(present) != 1:
        found = ", ".join(map(repr, value)) or "no keys"
        problem = "expected the keys of one shape," if present else "expected the keys"
        raise at.error(f"{problem} {EXPECTED}; found {found}")
    _check_used(value, present[0], at)
    if "text" in value:
        return Text(text=_string(value["text"], "text", at), at=at)
    if "messages" in value:
        messages = _messages(value["messages"], at)
        return Conversation(messages=messages, tools=_tools(value.get("tools"), at), at=at)
    return Completion(
        prompt=_string(value["prompt"], "prompt", at, may_be_empty=True),
        completion=_string(value["completion"], "completion", at),
        at=at,
    )


def _check_used(value: dict[str, Any], shape: frozenset[str], at: Location) -> None:
    """Refuse keys that nothing would read: a column that was meant to be learnt must not be lost without a word."""
    used = {*shape, *(OPTIONAL[key] for key in shape if key in OPTIONAL)}
    unused = [key for key in value if key not in used]
    if unused:
        expected = ", ".join(map(repr, sorted(used)))
        raise at.error(
            f"expected no keys but {expected} in a record with {', '.join(map(repr, sorted(shape)))}, found "
            f"{', '.join(map(repr, unused))}, which would not be used; remove them"
        )


def _tools(value: object, at: Location) -> tuple[dict[str, Any], ...]:
    """The tools of a conversation; null is none, as in a column that not every record has."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise at.error(f'expected "tools" to be a list of JSON objects, found {_kind(value)}')
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise at.error(f'expected "tools" to be what JSON can say, in valid Unicode, found: {error}') from error
    return tuple(value)


def _messages(value: object, at: Location) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise at.error(f'expected "messages" to be a list, found {_kind(value)}')
    messages = tuple(_message(item, index, at) for index, item in enumerate(value))
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise at.error(f'expected an "assistant" message to learn from, found roles {roles}')
    if roles[0] == "assistant":
        raise at.error('expected a "user" or "system" message before the first "assistant" message')
    return messages


def _message(value: object, index: int, at: Location) -> Message:
    name = f"messages[{index}]"
    if not isinstance(value, dict):
        raise at.error(f'expected {name} to be an object with "role" and "content", found {_kind(value)}')
    if value.keys() != {"role", "content"}:
        # A key that no template would be given (tool calls, images) must not be dropped without a word.
        found = ", ".join(map(repr, value)) or "no keys"
        raise at.error(f'expected {name} to have exactly the keys "role" and "content", found {found}')
    role = value["role"]
    if role not in ROLES:
        raise at.error(f"expected the role of {name} to be one of {', '.join(ROLES)}; found {role!r}")
    content = _string(value["content"], f"{name}.content", at, may_be_empty=role != "assistant")
    return Message(role=role, content=content)


def _string(value: object, name: str, at: Location, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise at.error(f"expected {name!r} to be a string, found {_kind(value)}")
    if not value and not may_be_empty:
        raise at.error(f"expected {name!r} to have text, found an empty string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair; no tokenizer can encode it.
        raise at.error(f"expected {name!r} to be valid Unicode, found a lone surrogate at {error.start}") from error
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names[type(value)]
