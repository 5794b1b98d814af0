"""One rank of `bench_memory.py`: load a checkpoint in one way, and write the measurement.

torchrun --nproc-per-node 2 tools/bench_memory_rank.py sharded build/llama-1gb build/measured
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from memory.measure import measure


def main(way: str, checkpoint: str, output: str) -> None:
    """Write `<output>/<way>-<rank>.json`."""
    dist.init_process_group("gloo")
    found = measure(way, Path(checkpoint))
    file = Path(output, f"{way}-{dist.get_rank()}.json")
    file.write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
