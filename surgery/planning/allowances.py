"""What no arithmetic gives: named constants, each with what it stands for and how it was measured."""

from __future__ import annotations

__all__ = [
    "ADAPTER_OBJECT_BYTES",
    "CPU_QUANTIZE_BYTES",
    "CUDA_QUANTIZE_BYTES",
    "DIGEST_BYTES",
    "GATHERED_BLOCKS",
    "GROUP_BYTES",
    "HOST_BYTES",
    "LOSS_COPIES",
    "NORM_COPIES",
    "OUTSIDE_ALLOCATOR",
    "STATE_BYTES",
    "TARGET_OBJECT_BYTES",
]

MIB = 1 << 20

#: Host memory that loading takes whatever the model: threads and their stacks, code and tables made on first use.
#: What a checkpoint of 251 MB took beside its tensors, upstream's modules imported before, with a C library that gives
#: freed memory back at once (`MALLOC_MMAP_THRESHOLD_=262144`): glibc as it comes keeps up to 20 MiB more.
HOST_BYTES = 5 * MIB

#: The same of a process group and of FSDP, where there are several ranks: on 2, 3 and 4 ranks of gloo.
GROUP_BYTES = 4 * MIB

#: Python objects for each tensor of the checkpoint (module, plan, part), and for each of an adapter (PEFT's, FSDP's):
#: of models on meta with 2 and with 126 layers.
TARGET_OBJECT_BYTES = 7 << 10
ADAPTER_OBJECT_BYTES = 57 << 10

#: Temporary bytes for each element that is being quantized, where it is: on a GPU the element itself, in 16 bits, its
#: packed half byte and its share of a statistic; on a CPU what bitsandbytes' kernel was seen to take.
CPU_QUANTIZE_BYTES = 16.0
CUDA_QUANTIZE_BYTES = 2.57

#: Temporaries of a digest on a GPU: 16 MiB of packed bytes put together, and their products in 64 bits.
DIGEST_BYTES = 48 * MIB

#: What belongs to a quant_state beside its statistics: tables of codes, offset, in blocks of the CUDA allocator.
STATE_BYTES = 2048

#: How many blocks a rank has unsharded under FSDP2 at most, by its streams: the one that computes, the next one as it
#: was gathered, and that one as parameters. (Read in torch 2.13, `_fsdp_param_group.py`; not measured.)
GATHERED_BLOCKS = 3

#: Copies of the logits in float32 at the worst moment of cross entropy: log-probabilities, and two gradients. With
#: this and the next, 8B under FSDP1 on two H200s (1 x 1024 tokens, no recomputation) peaked 4 % below the plan.
LOSS_COPIES = 3

#: Copies of the hidden state in float32 that the norms of a block keep for backward.
NORM_COPIES = 2

#: Device memory that torch's allocator does not count: the CUDA context, cuBLAS, NCCL. Round, and on the safe side.
OUTSIDE_ALLOCATOR = 768 * MIB
