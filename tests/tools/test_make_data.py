"""`tools/make_data.py`: real text, split so that nothing held out is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data import topics

from make_data import MAX_ANSWER, MIN_ANSWER, main, passages, record, split


def test_the_standard_library_gives_a_few_hundred_examples_of_reasonable_length() -> None:
    train, held_out = split(passages(topics.topics))
    assert len(train) >= 200
    assert len(held_out) >= 32
    assert all(MIN_ANSWER <= len(passage.text) <= MAX_ANSWER for passage in [*train, *held_out])


def test_no_topic_and_no_paragraph_is_on_both_sides() -> None:
    train, held_out = split(passages(topics.topics))
    assert not {passage.topic for passage in train} & {passage.topic for passage in held_out}
    trained = {paragraph for passage in train for paragraph in passage.text.split("\n\n")}
    assert not {paragraph for passage in held_out for paragraph in passage.text.split("\n\n")} & trained


def test_answers_are_text_of_their_topic_verbatim() -> None:
    for passage in passages(topics.topics):
        paragraphs = passage.text.split("\n\n")
        assert all(paragraph in topics.topics[passage.topic] for paragraph in paragraphs)


def test_headings_become_questions_and_shared_text_belongs_to_the_shortest_topic() -> None:
    shared = "A loop repeats its body. " * 8
    own = "Statements are run in order. " * 8
    section = f'The "for" loop\n==============\n\n{shared}'
    too_long = own.upper() * 4
    texts = {"for": section, "compound": f"{section}\n\nOther\n-----\n\n{own}\n\n{too_long}"}
    found = passages(texts)
    assert [(passage.topic, passage.heading) for passage in found] == [
        ("for", 'The "for" loop'),
        ("compound", "Other"),
    ]
    user, assistant = record(found[0])["messages"]
    assert user == {
        "role": "user",
        "content": 'What does the Python documentation say about: The "for" loop?',
    }
    assert assistant == {"role": "assistant", "content": shared.strip()}


def test_files_are_json_lines_and_the_same_every_time(tmp_path: Path) -> None:
    for run in ("first", "second"):
        main(tmp_path / run / "train.jsonl", tmp_path / run / "held_out.jsonl", held_out=10)
    for name in ("train.jsonl", "held_out.jsonl"):
        first, second = ((tmp_path / run / name).read_bytes() for run in ("first", "second"))
        assert first == second
        for line in first.decode().splitlines():
            roles = [message["role"] for message in json.loads(line)["messages"]]
            assert roles == ["user", "assistant"]
    assert len((tmp_path / "first" / "held_out.jsonl").read_text().splitlines()) == 10
