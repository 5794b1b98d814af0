"""Notices about tensors: their names counted in groups, and said in a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

__all__ = ["Notice", "group_names", "say"]

#: Kinds of notices, by the field of `Report` that keeps their names.
Notice = Literal["read_once_per_node", "ignored", "initialized", "misread"]

#: What a line says of one name, of several, and of either.
_TEXTS: Mapping[Notice, tuple[str, str, str]] = {
    "read_once_per_node": (
        "tensor is",
        "tensors are",
        "merged, split or transposed for the model, so read once per node, by one rank for the others",
    ),
    "ignored": (
        "name",
        "names",
        "in the checkpoint with no place in this model, ignored as transformers does",
    ),
    "initialized": (
        "buffer is",
        "buffers are",
        "not in the checkpoint; what transformers initializes is used",
    ),
    "misread": (
        "4-bit weight is",
        "4-bit weights are",
        (
            "dequantized wrongly by bitsandbytes on this CPU, where rows are not whole blocks. The result equals "
            'stock\'s; for the right one, run inside of patches.transaction("bitsandbytes.cpu-dequantize-flat", '
            'reason="...")'
        ),
    ),
}

#: Most groups that a line names; a model has few, however many layers and experts it has.
SHOWN = 8


def group_names(keys: Iterable[str]) -> dict[str, int]:
    """Count those of `keys`, which are unique, that differ in numbers alone, by their name with `*` where they do.

    In the order in which each group first appears: `{"model.layers.*.mlp.experts.*.w1.weight": 256}`. A key that is
    alone is its own name.
    """
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for key in keys:
        parts = key.split(".")
        groups.setdefault(tuple("*" if part.isdigit() else part for part in parts), []).append(parts)
    return {_common_name(members): len(members) for members in groups.values()}


def say(notice: Notice, groups: Mapping[str, int]) -> str:
    """The line about `groups`, at least one: how many names there are, what happens to them, and which they are."""
    one, several, what = _TEXTS[notice]
    total = sum(groups.values())
    return f"{total:,} {one if total == 1 else several} {what}: {', '.join(_names(groups))}."


def _names(groups: Mapping[str, int]) -> list[str]:
    names = [name if count == 1 else f"{name} ({count:,})" for name, count in groups.items()]
    rest = sum(list(groups.values())[SHOWN:])
    return [*names[:SHOWN], *([f"{rest:,} more"] if rest else [])]


def _common_name(members: list[list[str]]) -> str:
    """The name that all have, with `*` for numbers that are not the same in all."""
    return ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*members, strict=True))
