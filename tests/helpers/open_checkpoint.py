"""Run as a script: open checkpoints in a fresh process and print what came of it, one line of JSON each.

The arguments are keyword arguments of `Checkpoint.open`, as JSON, one argument an opening. With `STORE` and
`WORLD_SIZE` in the environment, the process is rank `RANK` of a gloo group that meets at the file `STORE`.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError


def main() -> None:
    store = os.environ.get("STORE")
    if store is not None:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        timeout = timedelta(seconds=120)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout
        )
    for argument in sys.argv[1:]:
        print(json.dumps(_open(json.loads(argument))), flush=True)
    if store is not None:
        dist.destroy_process_group()


def _open(arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        checkpoint = Checkpoint.open(arguments.pop("source"), **arguments)
    except CheckpointError as error:
        return {"error": str(error)}
    with checkpoint.reader() as reader:
        sums = {name: float(reader.read(name).sum()) for name in checkpoint.names()}
    return {
        "path": str(checkpoint.path),
        "revision": checkpoint.revision,
        "files": sorted(str(file.relative_to(checkpoint.path)) for file in checkpoint.path.rglob("*")),
        "sums": sums,
        "repr": repr(checkpoint),
    }


if __name__ == "__main__":
    main()
