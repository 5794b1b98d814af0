"""Collectives: objects and statistics to all ranks, parts of a tensor to the rank that keeps it.

Tensors travel as bytes. All functions are collective: to be called on all ranks of the group, in the same order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self, TypeVar

import torch
import torch.distributed as dist

from surgery.comm.failures import noticing_ends

__all__ = [
    "THREADS",
    "HostCopies",
    "add_up",
    "all_gather_flat",
    "all_gather_single",
    "gather_objects",
    "gather_parts",
    "gather_to",
    "scatter_parts",
]

T = TypeVar("T")

#: The name since torch 2.13, where the older one warns.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: Bytes that a rank sends at a time to rank 0, which has memory for one such run of every rank. On a CPU there is
#: nothing to gain by more, and glibc would not give larger pieces back.
RUN_BYTES = {"cuda": 16 << 20, "cpu": 1 << 20}


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The `value` of every rank of `group` (None: of all), in rank order; it must pickle. Collective."""
    if not dist.is_initialized():
        return [value]
    gathered: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered  # type: ignore[return-value]  # each rank has filled its own


def all_gather_flat(
    mine: torch.Tensor, sizes: Sequence[int], *, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Gather `(ranks, max(sizes))`: row i begins with the 1-D tensor of rank i, which has `sizes[i]` elements."""
    longest = max(sizes)
    padded = mine.new_zeros(longest)
    padded[: mine.numel()] = mine
    out = mine.new_empty(len(sizes) * longest)
    with noticing_ends():
        all_gather_single(_bytes(out), _bytes(padded), group=group)
    return out.view(len(sizes), longest)


def add_up(tensors: Sequence[torch.Tensor]) -> None:
    """Make each of `tensors`, in place, the sum of those of all ranks; one collective for all of a dtype."""
    if not dist.is_initialized():
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        mine = [tensor for tensor in tensors if tensor.dtype == dtype]
        together = torch.cat([tensor.reshape(-1) for tensor in mine])
        with noticing_ends():
            dist.all_reduce(together)
        for tensor, whole in zip(mine, torch.split(together, [tensor.numel() for tensor in mine]), strict=True):
            tensor.copy_(whole.view(tensor.shape))


def gather_parts(
    whole: torch.Tensor, parts: Sequence[range], position: int, *, group: dist.ProcessGroup | None
) -> None:
    """Fill the 1-D `whole` on every rank of `group`: rank i of it has the elements `parts[i]`, as `torch.chunk` makes
    them; `whole` has room for as many more elements as the last parts lack, and they are undefined afterwards.
    """
    longest = len(parts[0])
    everything = whole[: len(parts) * longest]
    start = position * longest
    mine = everything[start : start + longest]
    # NCCL gathers in place; gloo does not promise to.
    sent = mine if mine.is_cuda else mine.clone()
    with noticing_ends():
        all_gather_single(_bytes(everything), _bytes(sent), group=group)


def gather_to(
    mine: torch.Tensor,
    parts: Sequence[range],
    *,
    out: torch.Tensor | None,
    copy: Callable[[torch.Tensor, torch.Tensor], object] = torch.Tensor.copy_,
    rank: int = 0,
) -> None:
    """Fill `out[parts[i]]` with the `mine` of every rank i, on `rank`, which alone passes `out` (1-D).

    A bounded run at a time, each brought to its place by `copy(place, run)`.
    """
    run = RUN_BYTES.get(mine.device.type, RUN_BYTES["cuda"]) // mine.element_size()
    longest = max(len(part) for part in parts)
    for start in range(0, longest, run):
        length = min(run, longest - start)
        padded = mine.new_zeros(length)
        piece = mine[start : start + length]
        padded[: piece.numel()] = piece
        received = None if out is None else [torch.empty_like(padded) for _ in parts]
        with noticing_ends():
            dist.gather(_bytes(padded), None if received is None else [_bytes(tensor) for tensor in received], dst=rank)
        if out is None or received is None:
            continue
        for part, tensor in zip(parts, received, strict=True):
            wanted = part[start : start + length]
            copy(out[wanted.start : wanted.stop], tensor[: len(wanted)])


def scatter_parts(
    whole: torch.Tensor | None,
    parts: Sequence[range],
    position: int,
    *,
    like: torch.Tensor,
    source: int,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """This rank's elements, `parts[position]`, of a flat tensor that the rank `source` alone has, passed as `whole`.

    `parts` are those of the ranks of `group`, in its order; `source` is a rank of the whole job. `like` is any tensor
    of the dtype and on the device of what is received.
    """
    longest = max(len(part) for part in parts)
    received = like.new_empty(longest)
    sent = None
    if whole is not None:
        sent = [like.new_zeros(longest) for _ in parts]
        for buffer, part in zip(sent, parts, strict=True):
            buffer[: len(part)] = whole[part.start : part.stop]
    with noticing_ends():
        dist.scatter(_bytes(received), None if sent is None else [_bytes(b) for b in sent], src=source, group=group)
    return received[: len(parts[position])]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8, so that no backend takes packed bits for numbers."""
    return tensor.view(torch.uint8)


#: Memory that is touched for the first time costs a thread 0.6 to 1.2 s a GB in virtual machines; eight share it.
THREADS = 8


class HostCopies:
    """Copies tensors to the CPU in threads of its own; a context manager that ends them. On a CPU it copies at once.

    Each thread has a pinned buffer as large as the largest tensor that it was given, which the GPU copies to. Copies
    into ordinary memory that the driver makes by itself wait for each other, whichever thread asks for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="surgery-land")
        self._copies: deque[Future[None]] = deque()
        self._of_thread = threading.local()

    def copy(self, out: torch.Tensor, tensor: torch.Tensor) -> None:
        """Fill `out`, on the CPU, with `tensor`, once the work that the current stream has now is done."""
        if self._device.type != "cuda":
            out.copy_(tensor)
            return
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]  # no annotation upstream
        ready.record()
        self._copies.append(self._pool.submit(self._copy, out, tensor, ready))

    def wait(self) -> None:
        """Wait for all copies that were asked for. Raises what one of them raised."""
        while self._copies:
            self._copies.popleft().result()

    def _copy(self, out: torch.Tensor, tensor: torch.Tensor, ready: torch.cuda.Event) -> None:
        torch.cuda.set_device(self._device)  # of this thread
        mine = self._of_thread
        if not hasattr(mine, "stream"):
            mine.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # none upstream
            mine.pinned = torch.empty(0, dtype=torch.uint8, device="cpu")
        if mine.pinned.numel() < tensor.nbytes:
            mine.pinned = torch.empty(tensor.nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        pinned = mine.pinned[: tensor.nbytes]
        with torch.cuda.stream(mine.stream):
            ready.wait()
            pinned.copy_(tensor.view(torch.uint8), non_blocking=True)
        mine.stream.synchronize()  # after which `tensor` may be freed
        out.view(torch.uint8).copy_(pinned)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
