"""Xinference's patches of tqdm, by which it watches and cancels downloads, as declarations. See `tqdm_downloads.md`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar, copy_context
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import patches

if TYPE_CHECKING:
    from tqdm import tqdm

_download: ContextVar[Download | None] = ContextVar("download", default=None)


class Download:
    """A block whose progress bars are counted, and whose next update raises once `cancel` was called."""

    def __init__(self, cancel_error: type[BaseException] = asyncio.CancelledError) -> None:
        self._cancel_error = cancel_error
        self._cancelled = threading.Event()
        self._bars: set[tqdm[Any]] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._patches = patches.transaction("xinference-downloads", reason="a download is watched")
        self._patches.__enter__()
        self._token = _download.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _download.reset(self._token)
        self._patches.__exit__(kind, error, trace)

    def cancel(self) -> None:
        """Make the next update of every bar of this download raise."""
        self._cancelled.set()

    def add(self, bar: tqdm[Any]) -> None:
        """Count the bar from now on, or raise if the download was cancelled."""
        if self._cancelled.is_set():
            raise self._cancel_error("Download cancelled")
        with self._lock:
            self._bars.add(bar)

    @property
    def progress(self) -> float:
        """The share of the files that has arrived, from 0 to 1. A file on its way counts in part."""
        with self._lock:
            # A bar that has no `disable` yet is in its `__init__`.
            bars = [bar for bar in self._bars if not getattr(bar, "disable", True)]
        files = [bar for bar in bars if bar.unit == "it"]
        shares = [min(bar.n / bar.total, 1.0) for bar in bars if bar.unit != "it" and bar.total]
        # A file arrives before the bar of all files is told.
        arrived = max(sum(bar.n for bar in files), shares.count(1.0))
        on_their_way = sum(share for share in shares if share < 1.0)
        return min((arrived + on_their_way) / (sum(bar.total or 0 for bar in files) or 1), 1.0)


@patches.register(
    "xinference.tqdm-new",
    target="tqdm.std:tqdm.__new__",
    reason="the bar of all files is not updated before the first file has arrived",
    upstream="https://github.com/xorbitsai/inference/pull/3233",
    requires={"tqdm": ">=4.60,<5"},
)
def own_bar(
    wrapped: Callable[..., tqdm[Any]], _instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tqdm[Any]:
    """Give the new bar to the download that is running here."""
    bar = wrapped(*args, **kwargs)
    bar.download = _download.get()
    if bar.download is not None:
        bar.download.add(bar)
    return bar


@patches.register(
    "xinference.tqdm-update",
    target="tqdm.std:tqdm.update",
    reason="hubs report the progress of a download to tqdm alone, and cannot be cancelled otherwise",
    upstream="https://github.com/xorbitsai/inference/pull/3233",
    requires={"tqdm": ">=4.60,<5"},
    signature="(self, n=1)",
)
def watch_update(
    wrapped: Callable[..., bool | None], instance: tqdm[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool | None:
    """Update the bar, unless its download was cancelled."""
    if getattr(instance, "download", None) is not None:
        instance.download.add(instance)
    return wrapped(*args, **kwargs)


@patches.register(
    "xinference.thread-pool-context",
    target="concurrent.futures.thread:ThreadPoolExecutor.submit",
    reason="hubs make their bars in threads of a pool, which do not know the download",
    upstream="https://github.com/xorbitsai/inference/pull/3233",
    signature="(self, fn, /, *args, **kwargs)",
)
def carry_context(
    wrapped: Callable[..., Future[Any]], _instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Future[Any]:
    """Submit the call with the context of the submitting thread, where a download is running in it."""
    if _download.get() is None:
        return wrapped(*args, **kwargs)
    return wrapped(copy_context().run, *args, **kwargs)


patches.bundle(
    "xinference-downloads",
    ("xinference.tqdm-new", "xinference.tqdm-update", "xinference.thread-pool-context"),
    atomic=True,
)
