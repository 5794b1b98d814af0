"""The model card of an adapter: what it was made from, and how."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["render_card", "versions"]

_DISTRIBUTIONS = ("model-surgery", "torch", "bitsandbytes", "peft", "transformers", "accelerate", "wrapt")

Section = Mapping[str, object]


def render_card(config: PeftConfig, sections: Mapping[str, Section]) -> str:
    """The text of README.md: metadata of the Hugging Face Hub, the base model, `sections` by title, and versions."""
    base, revision = config.base_model_name_or_path, config.revision
    header = {
        # The hub takes ids alone.
        "base_model": base if base and not Path(base).is_absolute() else None,
        "library_name": "peft",
        "pipeline_tag": "text-generation" if config.task_type == "CAUSAL_LM" else None,
        "tags": "[lora, qlora]",
    }
    adapter = {name: getattr(config, name, None) for name in ("r", "lora_alpha", "lora_dropout")}
    tables: dict[str, Section] = {
        "Base model": {"name": base, "revision": revision},
        "Adapter": {"type": str(config.peft_type).removeprefix("PeftType."), **adapter, "targets": _targets(config)},
        **sections,
        "Versions": versions(),
    }
    lines = ["---", *(f"{key}: {value}" for key, value in header.items() if value is not None), "---", ""]
    lines.append("# Adapter trained on a 4-bit base model")
    for title, rows in tables.items():
        lines += ["", f"## {title}", "", "| | |", "|---|---|"]
        lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(lines) + "\n"


def _targets(config: PeftConfig) -> object:
    """The targets as given, or their last names only: PEFT may list each module of each layer."""
    targets = getattr(config, "target_modules", None)
    return targets if isinstance(targets, str) or not targets else sorted({each.rpartition(".")[2] for each in targets})


def versions() -> dict[str, str]:
    """Of Python and of the distributions that decide what a run does."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cell(value: object) -> str:
    """On one line, and without the character that ends a cell."""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple, set)) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
