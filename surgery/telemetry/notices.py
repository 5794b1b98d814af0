"""Names of tensors that need a word: counted in groups, and said in a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["group_names", "say_converted", "say_ignored", "say_initialized", "say_misread"]

#: Groups that a line names at most; a model has few, however many layers and experts it has.
SHOWN = 8


def group_names(keys: Iterable[str]) -> dict[str, int]:
    """How many of `keys`, which are unique, differ in numbers alone, by their name with `*` where they do.

    In the order in which each group first appears: `{"model.layers.*.mlp.experts.*.w1.weight": 256}`. A key that is
    alone is its own name.
    """
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for key in keys:
        parts = key.split(".")
        groups.setdefault(tuple("*" if part.isdigit() else part for part in parts), []).append(parts)
    return {_common_name(members): len(members) for members in groups.values()}


def say_converted(groups: Mapping[str, int]) -> str:
    """What happens to the tensors of `groups`, of which there is at least one, and which they are."""
    total = sum(groups.values())
    return (
        f"{total:,} tensor{' is' if total == 1 else 's are'} merged, split or transposed for the model, so read once "
        f"per node, by one rank for the others: {', '.join(_names(groups))}."
    )


def say_ignored(groups: Mapping[str, int]) -> str:
    """That the names of `groups`, of which there is at least one, are not used, and which they are."""
    total = sum(groups.values())
    return (
        f"{total:,} name{'' if total == 1 else 's'} in the checkpoint with no place in this model, ignored as "
        f"transformers does: {', '.join(_names(groups))}."
    )


def say_initialized(groups: Mapping[str, int]) -> str:
    """That the buffers of `groups`, of which there is at least one, are not in the checkpoint."""
    total = sum(groups.values())
    return (
        f"{total:,} buffer{' is' if total == 1 else 's are'} not in the checkpoint; what transformers initializes is "
        f"used: {', '.join(_names(groups))}."
    )


def say_misread(groups: Mapping[str, int]) -> str:
    """That bitsandbytes multiplies by other weights than those of `groups`, of which there is at least one."""
    total = sum(groups.values())
    return (
        f"{total:,} 4-bit weight{' is' if total == 1 else 's are'} dequantized wrongly by bitsandbytes on this CPU, "
        "where rows are not whole blocks. The result equals stock's; for the right one, run inside of "
        f'patches.transaction("bitsandbytes.cpu-dequantize-flat", reason="..."): {", ".join(_names(groups))}.'
    )


def _names(groups: Mapping[str, int]) -> list[str]:
    names = [name if count == 1 else f"{name} ({count:,})" for name, count in groups.items()]
    rest = sum(list(groups.values())[SHOWN:])
    return [*names[:SHOWN], *([f"{rest:,} more"] if rest else [])]


def _common_name(members: list[list[str]]) -> str:
    """The name that all have, with `*` for numbers that are not the same in all."""
    return ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*members, strict=True))
