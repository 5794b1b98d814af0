"""What no arithmetic gives: named constants, each with what it stands for and how it was measured."""

from __future__ import annotations

__all__ = [
    "ADAPTER_OBJECT_BYTES",
    "CPU_QUANTIZE_BYTES",
    "CUDA_QUANTIZE_BYTES",
    "GATHERED_BLOCKS",
    "HOST_BYTES",
    "LOSS_COPIES",
    "NORM_COPIES",
    "OUTSIDE_ALLOCATOR",
    "STATE_BYTES",
    "TARGET_OBJECT_BYTES",
]

MIB = 1 << 20

#: Host memory that loading takes whatever the model: threads and their stacks, heaps that the C library does not give
#: back, code and tables that are made on first use.
HOST_BYTES = 24 * MIB

#: Python objects for each tensor of the checkpoint (module, plan, part), and for each of an adapter (PEFT's, FSDP's).
TARGET_OBJECT_BYTES = 20 << 10
ADAPTER_OBJECT_BYTES = 30 << 10

#: Temporary bytes for each element that is being quantized, where it is quantized: on a GPU the element itself is one.
CPU_QUANTIZE_BYTES = 16.0
CUDA_QUANTIZE_BYTES = 2.57

#: What belongs to a quant_state beside its statistics: tables of codes, offset, in blocks of the CUDA allocator.
STATE_BYTES = 2048

#: How many blocks a rank has unsharded under FSDP2 at most: the one that computes, the next one as it was gathered,
#: and the copy of that into parameters.
GATHERED_BLOCKS = 3

#: Copies of the logits in float32 at the worst moment of cross entropy: log-probabilities, and two gradients.
LOSS_COPIES = 3

#: Copies of the hidden state in float32 that the norms of a block keep for backward.
NORM_COPIES = 2

#: Device memory that torch's allocator does not count: the CUDA context, cuBLAS, NCCL.
OUTSIDE_ALLOCATOR = 768 * MIB
