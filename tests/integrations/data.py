"""Sentences to train on, as files that `datasets` reads."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["write_data"]


def write_data(folder: Path) -> Path:
    """Write `train.jsonl` and `test.jsonl` into a new folder; return the folder."""
    folder.mkdir()
    for name, records in (("train", 24), ("test", 4)):
        lines = [json.dumps({"text": f"the cat said {number} to the dog"}) for number in range(records)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
