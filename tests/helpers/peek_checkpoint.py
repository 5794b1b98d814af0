"""Run as a script: look at checkpoints in a fresh process and print what came of it, one line of JSON each.

The arguments are keyword arguments of `peek`, as JSON, one argument a look.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from surgery.checkpoint.peek import peek
from surgery.errors import CheckpointError


def main() -> None:
    for argument in sys.argv[1:]:
        print(json.dumps(_look(json.loads(argument))), flush=True)


def _look(arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        checkpoint = peek(arguments.pop("source"), **arguments)
    except CheckpointError as error:
        return {"error": str(error)}
    shapes = {name: list(entry.shape) for name, entry in checkpoint.index.items()}
    return {"revision": checkpoint.revision, "config": checkpoint.config, "shapes": shapes}


if __name__ == "__main__":
    main()
