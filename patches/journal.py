"""The journal: each process writes its ledger to a file of its own in the folder `PATCHES_JOURNAL`, if set.

One JSON object per line, one line per change of state, in `<host>-<pid>.jsonl`. Each line is a single write to a
file opened for appending, so a killed process leaves at most its last line incomplete. A child made by `fork` starts
its own file with the lines of its parent, since it has the parent's patches.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

__all__ = ["VARIABLE", "Journal"]

VARIABLE: Final = "PATCHES_JOURNAL"


class Journal:
    """Writer of this process's journal.

    `history()` returns every line so far; it is called in a child, right after the fork. Callers of `write` hold
    the lock of the slots. Writing never raises: a full disk is no reason to leave a patch half applied. The first
    failure is logged as a warning.
    """

    def __init__(self, history: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        self._history = history
        self._pid: int | None = None
        self._session = ""
        self._failed = False

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line, if the variable is currently set."""
        folder = os.environ.get(VARIABLE)
        if not folder:
            return
        if self._pid is None:
            # Not on import, which must have no effect outside this package.
            os.register_at_fork(after_in_child=self._begin_child)
            self._begin()
        self._append(folder, line)

    def _begin(self) -> None:
        import time

        self._pid = os.getpid()
        # Process ids are reused. Readers take the last session in a file.
        self._session = f"{self._pid}-{time.time_ns()}"

    def _begin_child(self) -> None:
        folder = os.environ.get(VARIABLE)
        self._begin()
        for line in self._history() if folder else ():
            self._append(str(folder), line)

    def _append(self, folder: str, line: Mapping[str, Any]) -> None:
        import socket

        host = socket.gethostname()
        about = {"host": host, "pid": self._pid, "session": self._session, **_rank()}
        text = json.dumps({**line, **about}, default=str) + "\n"
        try:
            os.makedirs(folder, exist_ok=True)  # noqa: PTH103 - pathlib would be imported for these two calls alone
            path = os.path.join(folder, f"{host}-{self._pid}.jsonl")  # noqa: PTH118
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.write(file, text.encode())
            finally:
                os.close(file)
        except OSError as error:
            self._complain(folder, error)

    def _complain(self, folder: str, error: OSError) -> None:
        if self._failed:
            return
        self._failed = True
        import logging

        logging.getLogger(__name__).warning("%s=%s: this process is not in the journal: %s", VARIABLE, folder, error)


def _rank() -> dict[str, int]:
    """Rank and world size as set by a launcher such as torchrun."""
    variables = {"rank": "RANK", "world_size": "WORLD_SIZE"}
    return {
        name: int(os.environ[variable])
        for name, variable in variables.items()
        if os.environ.get(variable, "").isdigit()
    }
