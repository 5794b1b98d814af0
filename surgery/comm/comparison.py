"""Comparison over ranks, by one digest, of what must be the same; if it is not, all ranks say what differs, and how."""

from __future__ import annotations

import enum
import hashlib
import json
import re
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from typing import TypeAlias

import torch

from surgery.comm.failures import everyone, noticing_ends
from surgery.comm.ranks import Ranks
from surgery.errors import ConfigError

__all__ = ["Facts", "all_alike", "facts_of", "same_on_every_rank"]

#: Name -> value, both as text that equal processes write equally.
Facts: TypeAlias = Mapping[str, str]

#: Facts of a topic that an error shows, and characters of a value.
SHOWN = 4
WIDTH = 120

#: What is of one process alone: where an object is that has no text of its own, and the number of a device.
OF_ONE_PROCESS = re.compile(r" at 0x[0-9a-f]+|(?<=cuda):\d+")

#: A whole number as a float is written, which equals the integer.
WHOLE = re.compile(r"(-?\d+)\.0")


def facts_of(value: object, name: str = "", *, without: AbstractSet[str] = frozenset()) -> dict[str, str]:
    """Flatten `value`, a tree of dataclasses, mappings and sequences, to facts by dotted names; `without` some keys."""
    return dict(_facts(value, name, without))


def _facts(value: object, name: str, without: AbstractSet[str]) -> Iterator[tuple[str, str]]:
    children: Mapping[str, object] = {}
    if is_dataclass(value) and not isinstance(value, type):
        yield (name or "kind", type(value).__name__)
        children = {field.name: getattr(value, field.name, None) for field in fields(value)}
    elif isinstance(value, Mapping):
        children = {str(key): child for key, child in value.items()}
    elif isinstance(value, (list, tuple)):
        children = {str(number): child for number, child in enumerate(value)}
    elif isinstance(value, AbstractSet):
        children = {_text(member): "given" for member in value}
    if not children and not is_dataclass(value):
        yield (name or "value", _text(value))
    for key, child in children.items():
        if key not in without:
            yield from _facts(child, f"{name}.{key}" if name else key, without)


def _text(value: object) -> str:
    value = value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, float) and value.is_integer():
        return f"{value + 0:.1f}"  # all digits, and no sign of zero
    return OF_ONE_PROCESS.sub("", value if isinstance(value, str) else repr(value))


def same_on_every_rank(
    ranks: Ranks, name: str, topics: Mapping[str, Facts], *, device: torch.device | None = None
) -> None:
    """Raise `ConfigError` on every rank unless all have the same facts of every topic; to be called on all ranks alike.

    Costs a digest and one meeting where all agree; values are exchanged only where they do not.

    name: of this comparison, one of its own among those of `ranks`. device: what the process group speaks; None inside
    of `everyone`, where ranks meet at gates.
    """
    digests = {topic: _digest(json.dumps(sorted(_compared(facts).items())).encode()) for topic, facts in topics.items()}
    if all_alike(ranks, name, json.dumps(digests), device=device):
        return
    key = f"{ranks.prefix}/{name}"
    with noticing_ends():
        ranks.store.set(f"{key}/{ranks.rank}", json.dumps(digests))
        for topic, digest in digests.items():
            ranks.store.set(f"{key}/{topic}/{digest}", zlib.compress(json.dumps(dict(topics[topic])).encode()))
    _meet(ranks, f"{name}/told", device)
    with noticing_ends():
        told = [json.loads(ranks.store.get(f"{key}/{rank}")) for rank in range(ranks.world_size)]
        differing = {}
        for topic in dict.fromkeys(topic for of_rank in told for topic in of_rank):
            of_ranks = [of_rank.get(topic) for of_rank in told]
            if len(set(of_ranks)) > 1:
                found = {each: ranks.store.get(f"{key}/{topic}/{each}") for each in set(of_ranks) if each}
                facts = {digest: json.loads(zlib.decompress(data)) for digest, data in found.items()}
                differing[topic] = [facts.get(digest, {}) for digest in of_ranks]
    raise ConfigError(_refusal(differing))


def all_alike(ranks: Ranks, name: str, value: str, *, device: torch.device | None = None) -> bool:
    """Whether `value` is the same on all ranks; arguments and cost are those of `same_on_every_rank`."""
    if ranks.world_size == 1:
        return True
    key = f"{ranks.prefix}/{name}/{_digest(value.encode())}"
    with noticing_ends():
        ranks.count(key, 1)
    # Behind it every rank has counted itself, so that all come to the same conclusion.
    _meet(ranks, name, device)
    with noticing_ends():
        return ranks.count(key, 0) == ranks.world_size


def _compared(facts: Facts) -> dict[str, str]:
    """`facts` with equal numbers written alike."""
    return {name: WHOLE.sub(r"\1", value) if WHOLE.fullmatch(value) else value for name, value in facts.items()}


def _meet(ranks: Ranks, name: str, device: torch.device | None) -> None:
    if device is not None:
        with everyone(ranks, device=device):
            return
    stop = threading.Event()
    ranks.arrive(name, stop=stop)
    ranks.pass_gate(name, stop=stop)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _refusal(differing: Mapping[str, Sequence[Facts]]) -> str:
    """The message of the error. differing: the facts of every rank, by topic."""
    lines = [
        f"the ranks differ in {' and '.join(differing)}, and would train a mixture without a word; give all the same"
    ]
    for topic, by_rank in differing.items():
        compared = [_compared(facts) for facts in by_rank]
        names = list(dict.fromkeys(name for facts in by_rank for name in facts))
        names = [name for name in names if len({facts.get(name) for facts in compared}) > 1]
        lines += [f"  {topic}: {name} is {_values([facts.get(name) for facts in by_rank])}" for name in names[:SHOWN]]
        if len(names) > SHOWN:
            lines.append(f"  {topic}: so do {len(names) - SHOWN} more")
    return "\n".join(lines)


def _values(by_rank: Sequence[str | None]) -> str:
    ranks_of: dict[str | None, list[int]] = {}
    for rank, value in enumerate(by_rank):
        ranks_of.setdefault(value, []).append(rank)
    shown = {each: "not there" if each is None else each[:WIDTH] + "..." * (len(each) > WIDTH) for each in ranks_of}
    return ", ".join(f"{shown[value]} on {_ranks(ranks)}" for value, ranks in ranks_of.items())


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > SHOWN:
        return f"{len(ranks)} ranks, {ranks[0]} the first"
    return f"ranks {', '.join(map(str, ranks))}"
