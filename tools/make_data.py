"""Make instruction data from the help texts of Python itself (`pydoc_data.topics`).

    python tools/make_data.py build/demo/train.jsonl build/demo/held_out.jsonl

Real prose and code, a few hundred examples, without a download. Deterministic for one version of Python.
Every record is `{"messages": [user, assistant]}`. No paragraph of the held-out file is in the training file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Annotated

import typer

__all__ = ["Passage", "passages", "record", "split"]

#: Characters of an answer: more than a single line, and at most about 250 tokens.
MIN_ANSWER, MAX_ANSWER = 160, 900

#: One topic in this many is held out.
HELD_OUT_ONE_IN = 6

Record = dict[str, list[dict[str, str]]]


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Neighbouring paragraphs under one heading. part: 1 for the first passage under that heading."""

    topic: str
    heading: str
    part: int
    text: str


def passages(texts: Mapping[str, str]) -> list[Passage]:
    """Cut `texts` (topic -> help text) into passages of `MIN_ANSWER` to `MAX_ANSWER` characters.

    Many help texts contain other ones in full. Each paragraph is used once, in the shortest text that has it, so that
    topics share nothing.
    """
    seen: set[str] = set()
    found: list[Passage] = []
    for topic in sorted(texts, key=lambda name: (len(texts[name]), name)):
        for heading, paragraphs in _sections(topic, texts[topic]):
            fresh = [paragraph for paragraph in paragraphs if paragraph not in seen]
            seen.update(fresh)
            found.extend(_cut(topic, heading, fresh))
    return found


def _sections(topic: str, text: str) -> Iterator[tuple[str, list[str]]]:
    """`(heading, paragraphs)` in order; paragraphs above the first heading get the topic's name."""
    heading, paragraphs = topic, list[str]()
    for paragraph in text.split("\n\n"):
        title = _title(paragraph)
        if title is None:
            paragraphs.append(paragraph.strip("\n"))
            continue
        yield heading, paragraphs
        heading, paragraphs = title, []
    yield heading, paragraphs


def _title(paragraph: str) -> str | None:
    """The text of a heading, which is a fully underlined line, or None."""
    lines = paragraph.strip("\n").splitlines()
    if len(lines) != 2 or len(lines[0]) != len(lines[1]):
        return None
    return lines[0] if set(lines[1]) <= set("*=-~^") else None


def _cut(topic: str, heading: str, paragraphs: Iterable[str]) -> Iterator[Passage]:
    texts = [text for text in _joined(paragraphs) if MIN_ANSWER <= len(text) <= MAX_ANSWER]
    for part, text in enumerate(texts, 1):
        yield Passage(topic=topic, heading=heading, part=part, text=text)


def _joined(paragraphs: Iterable[str]) -> Iterator[str]:
    """Join neighbouring paragraphs while they fit; one longer than `MAX_ANSWER` stays alone."""
    text = ""
    for paragraph in paragraphs:
        joined = f"{text}\n\n{paragraph}" if text else paragraph
        if len(joined) <= MAX_ANSWER:
            text = joined
            continue
        yield text
        text = paragraph
    yield text


def record(passage: Passage) -> Record:
    """Make a record of a question about `passage`, with its text as the answer."""
    continued = f" (continued, part {passage.part})" if passage.part > 1 else ""
    question = f"What does the Python documentation say about: {passage.heading}?{continued}"
    # Not indented: a tokenizer would join the first spaces with the line break that ends the prompt.
    answer = passage.text.strip()
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def split(found: Iterable[Passage]) -> tuple[list[Passage], list[Passage]]:
    """Split into `(train, held out)`, each shuffled. A topic is wholly on one side, by a hash of its name."""
    train: list[Passage] = []
    held_out: list[Passage] = []
    for passage in sorted(found, key=lambda passage: _digest(passage.text)):
        side = held_out if _digest(passage.topic) % HELD_OUT_ONE_IN == 0 else train
        side.append(passage)
    return train, held_out


def _digest(text: str) -> int:
    # Not hash(), which differs between processes.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _write(file: Path, records: Iterable[Record]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records), encoding="utf-8")
    draft.replace(file)


def main(
    train_file: Annotated[Path, typer.Argument(help="JSONL file to write for training.")],
    held_out_file: Annotated[Path, typer.Argument(help="JSONL file to write for evaluation.")],
    held_out: Annotated[int, typer.Option(min=1, help="Keep at most this many held-out records.")] = 16,
) -> None:
    """Make instruction data from the help texts of Python itself."""
    train, evaluation = split(passages(topics.topics))
    evaluation = evaluation[:held_out]
    _write(train_file, map(record, train))
    _write(held_out_file, map(record, evaluation))
    typer.echo(f"{train_file}: {len(train)} records; {held_out_file}: {len(evaluation)} records")


if __name__ == "__main__":
    typer.run(main)
