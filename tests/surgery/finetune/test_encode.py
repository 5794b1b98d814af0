"""Samples: which tokens are learnt, for each shape, and what a tokenizer must be able to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from surgery.errors import ConfigError, DataError
from surgery.finetune.encode import Sample, encode_records
from surgery.finetune.records import Completion, Conversation, Location, Message, Record, Text
from tests.helpers.tiny_tokenizer import CHAT_TEMPLATE, MARKED_TEMPLATE, tiny_tokenizer

AT = Location(path=Path("data.jsonl"), line=7)


def encode(record: Record, tokenizer: Any, *, max_length: int = 512) -> Sample:
    (sample,) = encode_records([record], tokenizer, max_length=max_length)
    return sample


def learnt_text(sample: Sample, tokenizer: Any) -> str:
    return tokenizer.decode([token for token, learnt in zip(sample.ids, sample.learnt, strict=True) if learnt])


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(messages=tuple(Message(role=role, content=content) for role, content in turns), at=AT)


CHAT = conversation(
    ("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "so long")
)


def test_text_is_learnt_whole_and_ended() -> None:
    tokenizer = tiny_tokenizer()
    sample = encode(Text(text="the cat", at=AT), tokenizer)
    assert tokenizer.decode(sample.ids) == "the cat</s>"
    assert list(sample.learnt) == [1] * len(sample.ids)
    assert sample.targets == len(sample.ids) - 1


def test_beginning_token_is_added_and_not_learnt() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    sample = encode(Text(text="the cat", at=AT), tokenizer)
    assert tokenizer.decode(sample.ids) == "<s>the cat</s>"
    assert list(sample.learnt) == [0] + [1] * (len(sample.ids) - 1)


@pytest.mark.parametrize("prefix", ["<s> $A", "<pad> <s> $A"])
def test_beginning_token_that_the_text_has_is_not_doubled(prefix: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    special = [("<s>", tokenizer.bos_token_id), ("<pad>", tokenizer.pad_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=prefix, special_tokens=special)
    plain = encode(Text(text="the cat", at=AT), tokenizer)
    for begun in ("<s>", prefix.removesuffix(" $A").replace(" ", "")):
        assert encode(Text(text=f"{begun}the cat", at=AT), tokenizer) == plain
    completion = encode(Completion(prompt="<s>the", completion=" cat", at=AT), tokenizer)
    assert completion == encode(Completion(prompt="the", completion=" cat", at=AT), tokenizer)
    # What the text itself has twice, it keeps twice.
    assert len(encode(Text(text="<s><s>the cat", at=AT), tokenizer).ids) == len(plain.ids) + 1


def test_end_token_that_the_tokenizer_adds_is_not_doubled() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    sample = encode(Text(text="the cat", at=AT), tokenizer)
    assert tokenizer.decode(sample.ids) == "the cat</s>"
    assert sample.learnt[-1] == 1


def test_only_the_completion_is_learnt() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    sample = encode(Completion(prompt="what does the cat say?", completion=" meow", at=AT), tokenizer)
    assert tokenizer.decode(sample.ids) == "<s>what does the cat say? meow</s>"
    assert learnt_text(sample, tokenizer) == " meow</s>"


def test_token_across_the_boundary_is_learnt() -> None:
    tokenizer = tiny_tokenizer()
    joined = tokenizer(" the")["input_ids"]
    assert len(joined) == 1
    sample = encode(Completion(prompt=" t", completion="he", at=AT), tokenizer)
    assert list(sample.ids) == [*joined, tokenizer.eos_token_id]
    assert list(sample.learnt) == [1, 1]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE], ids=["prefixes", "generation markers"])
def test_only_assistant_turns_are_learnt(template: str) -> None:
    # The tokenizer adds a beginning token to text, but a template writes its own.
    tokenizer = tiny_tokenizer(chat_template=template, bos=True)
    sample = encode(CHAT, tokenizer)
    assert tokenizer.decode(sample.ids) == (
        "<|system|>be kind</s><|user|>hi</s><|assistant|>hello</s><|user|>bye</s><|assistant|>so long</s>"
    )
    assert learnt_text(sample, tokenizer) == "hello</s>so long</s>"


TOOLS = ({"type": "function", "function": {"name": "look_up", "parameters": {}}},)
WITH_TOOLS = replace(CHAT, tools=TOOLS)
SHOWN = "{% if tools %}{{ tools | tojson }}{% endif %}"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE], ids=["prefixes", "generation markers"])
def test_tools_are_shown_and_not_learnt(template: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=SHOWN + template)
    sample, without = encode(WITH_TOOLS, tokenizer), encode(CHAT, tokenizer)
    assert tokenizer.decode(sample.ids) == json.dumps(list(TOOLS)) + tokenizer.decode(without.ids)
    assert learnt_text(sample, tokenizer) == "hello</s>so long</s>"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE], ids=["prefixes", "generation markers"])
def test_a_template_of_its_own_for_tools_is_used(template: str) -> None:
    """A tokenizer with several templates: another may have the markers, or the only place for tools."""
    other = MARKED_TEMPLATE if template == CHAT_TEMPLATE else CHAT_TEMPLATE
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": template, "tool_use": SHOWN + other}
    for record in (CHAT, WITH_TOOLS):
        assert learnt_text(encode(record, tokenizer), tokenizer) == "hello</s>so long</s>"
    assert "look_up" in tokenizer.decode(encode(WITH_TOOLS, tokenizer).ids)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE], ids=["prefixes", "generation markers"])
def test_a_template_that_leaves_tools_out_is_refused(template: str) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:7: the chat template .* does not show tools"):
        encode(WITH_TOOLS, tiny_tokenizer(chat_template=template))


#: Templates that leave out messages, and the one of `CHAT` that is named.
LEFT_OUT = {
    "a role": ("{% for m in messages if m.role != 'system' %}BODY{% endfor %}", 0),
    "all but the last two": ("{% for m in messages[-2:] %}BODY{% endfor %}", 0),
    "all but the first three": ("{% for m in messages[:3] %}BODY{% endfor %}", 3),
    "earlier answers": ("{% for m in messages if m.role != 'assistant' or m == messages[-1] %}BODY{% endfor %}", 2),
    "by content": ("{% for m in messages if not m.content.startswith('by') %}BODY{% endfor %}", 3),
    "all but the header": (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{% else %}BODY{% endif %}{% endfor %}",
        1,
    ),
}
BODY = "<|{{ m.role }}|>{{ m.content }}{{ eos_token }}"
MARKED_BODY = (
    "<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}"
)


@pytest.mark.parametrize("body", [BODY, MARKED_BODY], ids=["prefixes", "generation markers"])
@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_template_that_leaves_a_message_out_is_refused(case: str, length: int, body: str) -> None:
    template, index = LEFT_OUT[case]
    chat = conversation(*((m.role, " ".join([m.content] * length)) for m in CHAT.messages))
    role = CHAT.messages[index].role
    with pytest.raises(DataError, match=rf"data\.jsonl:7: .* does not show messages\[{index}\], of the role '{role}'"):
        encode(chat, tiny_tokenizer(chat_template=template.replace("BODY", body)))


#: Templates that change what they show, or look at it, and leave out no message.
SHOWN_OTHERWISE = {
    "trimmed": "{{ m.content | trim }}",
    "upper case": "{{ m.content | upper }}",
    "without what was thought": "{{ m.content.split('</think>') | last }}",
    "as JSON": "{{ m.content | tojson }}",
    "one content alone": (
        "{% if m.role == 'tool' and m.content != '22 degrees' %}{{ raise_exception('no number') }}{% endif %}"
        "{{ 'warm' if m.role == 'tool' else m.content }}"
    ),
}


@pytest.mark.parametrize("shown", SHOWN_OTHERWISE.values(), ids=SHOWN_OTHERWISE)
def test_a_template_that_shows_messages_in_another_form_is_not_refused(shown: str) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>" + shown + "{{ eos_token }}{% endfor %}"
    chat = conversation(
        ("system", " "), ("user", ""), ("assistant", "<think>x</think>"), ("tool", "22 degrees"), ("assistant", "warm")
    )
    assert encode(chat, tiny_tokenizer(chat_template=template)).targets


def test_generation_prompt_that_answers_do_not_keep_leaves_the_header_in() -> None:
    template = CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    tokenizer = tiny_tokenizer(chat_template=template)
    sample = encode(conversation(("user", "hi"), ("assistant", "hello")), tokenizer)
    assert learnt_text(sample, tokenizer) == "<|assistant|>hello</s>"


def test_template_that_rewrites_earlier_turns_is_refused() -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last else m.content | upper }}{% endfor %}"
    tokenizer = tiny_tokenizer(chat_template=template)
    with pytest.raises(DataError, match=r"data\.jsonl:7: the chat template renders messages\[2\] differently"):
        encode(CHAT, tokenizer)


@pytest.mark.parametrize("marker", ["", "{% generation %}{% endgeneration %}"])
def test_messages_that_the_template_refuses(marker: str) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + marker
    with pytest.raises(DataError, match=r"data\.jsonl:7: the chat template refuses these messages: no system role"):
        encode(CHAT, tiny_tokenizer(chat_template=template))


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", "{{ messages[0].content + 1 }}", "{% if %}"])
def test_whatever_a_template_raises_is_an_error_about_the_record(template: str) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:7: the chat template refuses these messages"):
        encode(CHAT, tiny_tokenizer(chat_template=template))


def test_truncation_comes_after_the_end_token() -> None:
    tokenizer = tiny_tokenizer()
    whole = encode(Text(text="the cat sat", at=AT), tokenizer)
    cut = encode(Text(text="the cat sat", at=AT), tokenizer, max_length=3)
    assert list(cut.ids) == list(whole.ids)[:3]
    assert (whole.cut, cut.cut) == (0, len(whole.ids) - 3)
    assert encode(Completion(prompt="the cat sat", completion="!", at=AT), tokenizer, max_length=3).targets == 0


def test_truncation_saved_with_the_tokenizer_is_not_obeyed() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(max_length=2)
    assert tokenizer.decode(encode(Text(text="the cat sat", at=AT), tokenizer).ids) == "the cat sat</s>"


def test_mixed_shapes_keep_their_order_across_chunks() -> None:
    tokenizer = tiny_tokenizer()
    chat = conversation(("user", "q"), ("assistant", "a"))
    records = [chat if index % 3 else Text(text=str(index), at=AT) for index in range(1200)]
    texts = [tokenizer.decode(sample.ids) for sample in encode_records(records, tokenizer, max_length=64)]
    assert texts == ["<|user|>q</s><|assistant|>a</s>" if index % 3 else f"{index}</s>" for index in range(1200)]


def test_first_token_never_counts() -> None:
    sample = encode(Text(text="a", at=AT), tiny_tokenizer())
    assert len(sample.ids) == 2
    assert sample.targets == 1


def test_missing_chat_template() -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        encode(CHAT, tiny_tokenizer(chat_template=None))


def test_missing_end_token() -> None:
    with pytest.raises(ConfigError, match="has no end-of-sequence token"):
        encode(Text(text="a", at=AT), tiny_tokenizer(eos_token=None))


def test_tokenizer_without_offsets() -> None:
    from transformers import PreTrainedTokenizerBase

    class Slow(PreTrainedTokenizerBase):
        is_fast = False

    with pytest.raises(ConfigError, match=r"character offsets .* found Slow"):
        encode(Text(text="a", at=AT), Slow())
