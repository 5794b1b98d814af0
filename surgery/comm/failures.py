"""One rank's failure is every rank's: all stop with its error, and none is left waiting in a collective."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
import torch.distributed as dist

from surgery.comm.heartbeat import beating, silent_ranks
from surgery.comm.ranks import PeerError, Ranks, current_ranks, lost

__all__ = ["collective", "everyone", "meet", "noticing_ends", "together"]

#: What NCCL says where it is not its own rank that is at fault (torch 2.13, `ProcessGroupNCCL.cpp`, `NCCLUtils.cpp`).
REMOTE = re.compile("remote|network|connection|abort|ncclSystemError|time[d ]*out", re.IGNORECASE)

#: A connection that is in order, with a rank that has nothing to say.
SLOW = re.compile("time[d ]*out", re.IGNORECASE)


@contextlib.contextmanager
def everyone(ranks: Ranks, *, device: torch.device) -> Iterator[None]:
    """A block without collectives that all ranks leave together: if one fails, all do, with its error.

    A rank that fails reports it, so that the others stop at their next layer instead of finishing, then meets
    them at the end of the block; they raise `PeerError`. A rank that dies outright is noticed there.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001  # raised below, once the others are told
        # Also what seems to be the fault of others: they may know nothing of it. The first report stays.
        ranks.report_failure(error)
        failure = error
    except BaseException as error:  # an interrupt waits for nobody
        ranks.report_failure(error, desynced=True)
        raise
    if failure is not None and ranks.desynced.is_set():
        raise failure
    if failure is not None:
        with contextlib.suppress(PeerError):  # a rank that is gone is no news to one that has failed itself
            meet(ranks, device, failed=True)
        raise failure
    # Asked only if there was a failure: a report may be from after this block by now, which another rank has left.
    if meet(ranks, device):
        ranks.raise_peer_failure()
        raise lost(None)


def meet(ranks: Ranks, device: torch.device, *, failed: bool = False) -> bool:
    """Wait for the other ranks, on the `device` of their group; returns whether any of them has `failed`.

    Raises `PeerError` if one is gone.
    """
    if ranks.world_size == 1:
        return failed
    failures = torch.tensor([failed], dtype=torch.float32, device=device)
    try:
        dist.all_reduce(failures)
        return failures.item() > 0
    except RuntimeError as error:
        raise _reason(ranks, error) from error


@contextlib.contextmanager
def collective(ranks: Ranks) -> Iterator[None]:
    """A block with collectives: the loss of a connection in it becomes the `PeerError` of the rank that has ended.

    Which rank that was is known if it has reported a failure, as one does that fails in such a block; or if it no
    longer beats (see `beating`, which is to be around this block). The ranks do not meet at its end, because they could
    be waiting for each other inside: the others notice when the process of the one that failed has ended.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_others(error):
            ranks.report_failure(error, desynced=True)
            raise
        reason = _reason(ranks, error)
        ranks.relay_failure(reason)
        if reason is error:
            raise
        raise reason from error
    except BaseException as error:  # an interrupt
        ranks.report_failure(error, desynced=True)
        raise


@contextlib.contextmanager
def together() -> Iterator[None]:
    """`collective` for a block, or as `@together()` a function, that has no `Ranks` yet; with `beating` around it."""
    ranks = current_ranks()
    with beating(ranks), collective(ranks):
        yield


@contextlib.contextmanager
def noticing_ends() -> Iterator[None]:
    """A block with one collective: the loss of its connection is raised as `PeerError`, since another rank is gone.

    For code that does not know its `Ranks`, somewhere inside of `collective`, which finds out what rank that was.
    """
    try:
        yield
    except RuntimeError as error:
        if _is_of_others(error):
            raise lost(None) from error
        raise


def _is_of_others(error: BaseException) -> bool:
    """Whether `error`, or one of its causes, says that other ranks do not answer.

    gloo raises plain RuntimeErrors, which name a file of its sources: `[.../gloo/transport/tcp/pair.cc:553] Connection
    closed by peer` (torch 2.13).
    """
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)
    return any(
        isinstance(cause, (PeerError, dist.DistNetworkError, dist.DistStoreError))
        or (isinstance(cause, dist.DistBackendError) and REMOTE.search(str(cause)) is not None)
        or (isinstance(cause, RuntimeError) and "gloo/" in str(cause))
        for cause in causes
    )


def _reason(ranks: Ranks, error: BaseException) -> PeerError:
    """The reason why ranks do not answer: a failure that one has reported, or ranks without a heartbeat."""
    try:
        ranks.raise_peer_failure()
    except PeerError as peer:
        if peer.rank not in (None, ranks.rank):
            return peer
    if isinstance(error, PeerError) and error.rank is not None:
        return error
    try:
        silent = silent_ranks(ranks)
    except PeerError as peer:
        return peer
    if SLOW.search(str(error)) and not silent:
        return ranks.too_slow()
    if len(silent) < 2:
        return lost(*silent or (None,))
    which = f"one or more of the ranks {', '.join(map(str, silent))}"
    return PeerError(str(lost(None)).replace("another rank", which), rank=None)
