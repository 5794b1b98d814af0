"""Arguments of the command line that are more than a name or a number, as the values that they stand for."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from surgery.errors import ConfigError
from surgery.finetune.choices import QuantStorageName

if TYPE_CHECKING:
    import torch

__all__ = ["parse_list", "parse_mesh", "parse_storage", "parse_targets", "parse_timeout"]


def parse_list(value: str) -> tuple[str, ...]:
    """Items of a comma-separated list; empty ones are none."""
    return tuple(filter(None, (item.strip() for item in value.split(","))))


def parse_targets(value: str) -> tuple[str, ...]:
    """Names of modules; none stands for all linear ones."""
    return () if value == "all-linear" else parse_list(value)


def parse_storage(name: QuantStorageName) -> torch.dtype | None:
    """The dtype, or None for `auto`."""
    import torch

    dtypes = {
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float32": torch.float32,
        "uint8": torch.uint8,
    }
    return dtypes.get(name)


def parse_mesh(value: str | None) -> tuple[int, int] | None:
    """`2x4` as `(2, 4)`; raises `ConfigError` for anything else."""
    if value is None:
        return None
    replicate, separator, shard = value.lower().partition("x")
    if not (separator and replicate.isdecimal() and shard.isdecimal()):
        raise ConfigError(f"expected --mesh as REPLICATExSHARD, such as 2x4, found {value!r}")
    return int(replicate), int(shard)


def parse_timeout(minutes: float) -> timedelta:
    """Minutes as a duration; raises `ConfigError` if there is no such timeout."""
    if not 0 < minutes < 7 * 24 * 60:
        raise ConfigError(f"expected --timeout as minutes, above 0 and below a week, found {minutes:g}")
    return timedelta(minutes=minutes)
