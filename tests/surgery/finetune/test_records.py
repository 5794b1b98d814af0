"""Reading JSONL: the three shapes, and an error with file and line for everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import DataError
from surgery.finetune.records import Completion, Conversation, Message, Text, read_records

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}


def write(tmp_path: Path, *lines: str | bytes) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


def test_each_shape_is_read_in_order(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{"text": "abc"}',
        '{"prompt": "", "completion": "b"}',
        json.dumps({"messages": [USER, ASSISTANT]}),
    )
    text, completion, conversation = read_records(path)
    assert isinstance(text, Text)
    assert text.text == "abc"
    assert isinstance(completion, Completion)
    assert (completion.prompt, completion.completion) == ("", "b")
    assert isinstance(conversation, Conversation)
    assert conversation.messages == (
        Message(role="user", content="hi"),
        Message(role="assistant", content="hello"),
    )
    assert [record.at.line for record in (text, completion, conversation)] == [1, 2, 3]


def test_blank_lines_count_but_are_passed_over(tmp_path: Path) -> None:
    records = read_records(write(tmp_path, "", '{"text": "a"}', "   ", '{"text": "b"}', ""))
    assert [record.at.line for record in records] == [2, 4]


def test_byte_order_mark_and_line_separators_inside_strings(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbf" + '{"text": "one\u2028two"}'.encode())
    (record,) = read_records(path)
    assert isinstance(record, Text)
    assert record.text == "one\u2028two"


@pytest.mark.parametrize(
    ("line", "expected", "found"),
    [
        ("{text: 1}", "not JSON", "column 2"),
        ('"text"', "expected a JSON object", "found a string"),
        ("null", "expected a JSON object", "found null"),
        ("[1]", "expected a JSON object", "found a list"),
        ("{}", "expected the keys", "found no keys"),
        ('{"txt": "a"}', '{"prompt", "completion"}', "'txt'"),
        ('{"prompt": "a"}', "expected the keys", "found 'prompt'"),
        ('{"text": "a", "messages": []}', "expected the keys of one shape", "'text', 'messages'"),
        ('{"text": 3}', "'text' to be a string", "found a number"),
        ('{"text": ""}', "'text' to have text", "an empty string"),
        ('{"text": "\\ud800"}', "valid Unicode", "lone surrogate at 0"),
        ('{"prompt": null, "completion": "a"}', "'prompt' to be a string", "found null"),
        ('{"prompt": "a", "completion": ["b"]}', "'completion' to be a string", "found a list"),
        ('{"prompt": "a", "completion": ""}', "'completion' to have text", "an empty string"),
        ('{"messages": {"role": "user"}}', '"messages" to be a list', "found an object"),
        ('{"messages": []}', '"assistant" message to learn from', "[]"),
        ('{"text": "a", "source": "web"}', "no keys but 'text'", "'source', which would not be used"),
        ('{"text": "a", "tools": []}', "no keys but 'text'", "'tools', which would not be used"),
        ('{"prompt": "a", "completion": "b", "id": 1, "weight": 2}', "'completion', 'prompt'", "'id', 'weight'"),
        ('{"text": "a", "text": "b"}', "not a training record", "the key 'text' appears twice"),
        ('{"text": ' + "1" * 5000 + "}", "not a training record", "a number of 5000 digits"),
        ('{"text": -' + "7" * 3_000_000 + "}", "not a training record", "a number of 3000001 digits"),
        ('{"text": 1e99999}', "'text' to be a string", "found a number"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str, expected: str, found: str) -> None:
    path = write(tmp_path, '{"text": "fine"}', line)
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert expected in str(caught.value)
    assert found in str(caught.value)
    assert (caught.value.path, caught.value.line) == (path, 2)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], "found roles ['user']"),
        ([ASSISTANT], 'before the first "assistant" message'),
        (["hi", ASSISTANT], "messages[0] to be an object"),
        ([{"role": "bot", "content": "hi"}, ASSISTANT], "the role of messages[0]"),
        ([{"role": ["user"], "content": "hi"}, ASSISTANT], "the role of messages[0]"),
        ([USER, {"role": "assistant"}], "messages[1] to have exactly the keys"),
        ([USER, ASSISTANT | {"tool_calls": []}], "'tool_calls'"),
        ([USER, {"role": "assistant", "content": None}], "'messages[1].content' to be a string"),
        ([USER, {"role": "assistant", "content": ""}], "'messages[1].content' to have text"),
    ],
)
def test_bad_messages_are_named(tmp_path: Path, messages: list[Any], expected: str) -> None:
    path = write(tmp_path, json.dumps({"messages": messages}))
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert expected in str(caught.value)
    assert caught.value.line == 1


def test_tools_are_kept_and_null_is_none(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    lines = [json.dumps({"messages": [USER, ASSISTANT], "tools": each}) for each in (tools, [], None)]
    found = read_records(write(tmp_path, *lines))
    assert [record.tools for record in found if isinstance(record, Conversation)] == [tuple(tools), (), ()]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ('"tools": {"name": "a"}', '"tools" to be a list of JSON objects, found an object'),
        ('"tools": ["look_up"]', '"tools" to be a list of JSON objects, found a list'),
        ('"tools": [{"most": Infinity}]', '"tools" to be what JSON can say'),
        ('"tools": [{"name": "\\udc00"}]', '"tools" to be what JSON can say, in valid Unicode'),
        ('"tools": [{"most": ' + "9" * 4400 + "}]", "a number of 4400 digits"),
        ('"documents": []', "found 'documents', which would not be used"),
        ('"chat_template_kwargs": {}', "no keys but 'messages', 'tools'"),
    ],
)
def test_bad_tools_and_other_keys_of_a_conversation_are_named(tmp_path: Path, extra: str, expected: str) -> None:
    messages = json.dumps([USER, ASSISTANT])
    with pytest.raises(DataError) as caught:
        read_records(write(tmp_path, f'{{"messages": {messages}, {extra}}}'))
    assert expected in str(caught.value)
    assert caught.value.line == 1


def test_line_that_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:1: expected UTF-8, found byte 0xff"):
        read_records(write(tmp_path, b'{"text": "\xff"}'))


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_empty_file(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="found an empty file"):
        read_records(write(tmp_path, content))


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_records(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="Is a directory"):
        read_records(tmp_path)


def test_deep_nesting_is_refused_and_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nested too deeply|expected a JSON object"):
        read_records(write(tmp_path, "[" * 200_000 + "]" * 200_000))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["text", "role", "content", "x"]), inner),
    max_leaves=8,
)
keys = st.sampled_from(["text", "prompt", "completion", "messages", "other"])


@given(value=json_values | st.dictionaries(keys, json_values))
def test_any_json_is_a_record_or_a_data_error(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = write(tmp_path_factory.mktemp("any"), json.dumps(value))
    try:
        records = read_records(path)
    except DataError:
        return
    assert [type(record) in (Text, Completion, Conversation) for record in records] == [True]
