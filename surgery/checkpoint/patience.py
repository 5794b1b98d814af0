"""Time limits for requests to the hub: a warning after some seconds, then an error.

`huggingface_hub` (to 2.4) sets no limit for what it asks the hub's API, so that a host that takes a connection and
never answers is waited for without end and without a word.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from surgery.errors import CheckpointError

__all__ = ["Patience", "patience", "say_cache_is_taken"]

log = logging.getLogger("surgery")

#: Seconds without an answer after which the user is told of it.
SAID_AFTER = 5.0


class Patience:
    """Requests for a repository that have no answer yet, and the time until which each is waited for."""

    def __init__(self, repo_id: str, limit: float, *, at_first: float) -> None:
        self._repo_id, self._limit, self._later = repo_id, at_first, limit
        self._lock = threading.Lock()
        self._waiting: dict[tuple[str, str], tuple[float, threading.Timer]] = {}

    @property
    def unanswered(self) -> str | None:
        """The first request without an answer, as `METHOD URL`; None where all have theirs."""
        with self._lock:
            return next((" ".join(asked) for asked in self._waiting), None)

    def ask(self, request: Any) -> None:
        """Give a request of httpx a time limit if it has none; refuse it once another has timed out."""
        now, timeouts = time.monotonic(), request.extensions.get("timeout") or {}
        limits = {phase: timeouts.get(phase) or self._limit for phase in ("connect", "read", "write", "pool")}
        request.extensions = {**request.extensions, "timeout": limits}
        if self._repo_id not in str(request.url):
            return  # nothing that is needed: huggingface_hub 2 also looks up who is asking, for two seconds at most
        self._refuse_after_silence(now)
        timer = threading.Timer(SAID_AFTER, self._say, (request, limits["read"]))
        timer.daemon = True
        with self._lock:
            _, earlier = self._waiting.pop(_asked(request), (0.0, None))
            self._waiting[_asked(request)] = now + limits["read"], timer
        if earlier is not None:
            earlier.cancel()
        if limits["read"] > SAID_AFTER:
            timer.start()

    def hear(self, response: Any) -> None:
        """Note that a request has been answered, whatever the answer."""
        if self._repo_id in str(response.request.url):
            self._limit = self._later
        with self._lock:
            _, timer = self._waiting.pop(_asked(response.request), (0.0, None))
        if timer is not None:
            timer.cancel()

    def end(self) -> None:
        """Cancel the warnings that are still to come."""
        with self._lock:
            for _, timer in self._waiting.values():
                timer.cancel()

    def _refuse_after_silence(self, now: float) -> None:
        # huggingface_hub asks again after a timeout, five times and for longer.
        with self._lock:
            late = next((asked for asked, (until, _) in self._waiting.items() if now >= until), None)
        if late is not None:
            raise CheckpointError(
                f"The hub has not answered {' '.join(late)} within {self._limit:g} s. Check the network and "
                "HF_ENDPOINT, or set HF_HUB_ETAG_TIMEOUT to the number of seconds that it may take "
                "(HF_HUB_DOWNLOAD_TIMEOUT for data of files)."
            )

    def _say(self, request: Any, seconds: float) -> None:
        log.warning(
            "Waiting for an answer to %s for %.0f s now; giving up after %.0f s (HF_HUB_ETAG_TIMEOUT).",
            " ".join(_asked(request)),
            SAID_AFTER,
            seconds,
        )


@contextmanager
def patience(repo_id: str, *, at_first: float | None = None) -> Iterator[Patience]:
    """Watch the requests of `huggingface_hub` for a repository in this block, by hooks of its HTTP client.

    A request may take `HF_HUB_ETAG_TIMEOUT` seconds where upstream sets no limit; until something has been answered,
    at most `at_first`. Raises `CheckpointError` from within a request that follows one that had no answer in time.
    """
    from huggingface_hub import constants, get_session

    limit = float(constants.HF_HUB_ETAG_TIMEOUT)
    found, hooks = Patience(repo_id, limit, at_first=min(limit, at_first or limit)), get_session().event_hooks
    # Lists that the client reads at each request; assigning to `event_hooks` would copy what others have put there.
    hooks["request"].append(found.ask)
    hooks["response"].append(found.hear)
    try:
        yield found
    finally:
        hooks["request"].remove(found.ask)
        hooks["response"].remove(found.hear)
        found.end()


def say_cache_is_taken(repo_id: str, commit: str, asked: Patience) -> None:
    """Warn that the cache was used without asking the hub."""
    log.warning(
        "No answer to %s: taking %s at commit %s, which is complete in the cache. There may be a later one.",
        asked.unanswered,
        repo_id,
        commit,
    )


def _asked(request: Any) -> tuple[str, str]:
    return request.method, str(request.url)
