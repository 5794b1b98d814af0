"""The journal: each process writes its ledger to a file of its own in the folder `PATCHES_JOURNAL`, if set.

One JSON object per line, one line per change of state, in `<host>-<pid>.jsonl`. Each line is a single write to a
file opened for appending, so a killed process leaves at most its last line incomplete. A child made by `fork` starts
its own file with the lines of its parent, since it has the parent's patches. `read_journals` compares the files.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from .errors import JournalError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["VARIABLE", "Application", "Difference", "Journal", "Process", "Processes", "read_journals"]

VARIABLE: Final = "PATCHES_JOURNAL"
_REQUIRED: Final = ("serial", "id", "target", "state", "scope", "verdict", "owner", "host", "pid", "session")
# These states make no difference: one has no effect, the other will have it as soon as it can.
_REVERTED: Final = "reverted"
_WAITS: Final = "pending"
_FAILED: Final = "failed"
_Lines = Callable[[], Iterable[Mapping[str, Any]]]


class Journal:
    """Writer of this process's journal.

    `history()` returns every line so far; it is called in a child, right after the fork. `counts()` returns a line for
    each receipt whose calls are counted, with `calls` and `passed`; it is called when the process ends. Callers of
    `write` hold the lock of the slots. Writing never raises: no trouble with a file is a reason to leave a patch half
    applied. The first failure is logged as a warning.
    """

    def __init__(self, history: _Lines, counts: _Lines = tuple) -> None:
        self._history = history
        self._counts = counts
        self._pid: int | None = None
        self._session = ""
        self._failed = False

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line, if the variable is currently set."""
        self._write(lambda: (_without_counts(line),))

    def write_counts(self) -> None:
        """Append the counts of calls, if the variable is currently set."""
        self._write(self._counts)

    def _write(self, lines: _Lines) -> None:
        folder = os.environ.get(VARIABLE)
        if not folder:
            return
        try:
            if self._pid is None:
                self._begin()
            for line in lines():
                self._append(folder, line)
        except Exception as error:  # noqa: BLE001 - odd paths, values that cannot be written, whatever else
            is_first, self._failed = not self._failed, True
            if is_first:
                import logging

                what = "%s=%s: this process is not in the journal: %r"
                logging.getLogger(__name__).warning(what, VARIABLE, folder, error)

    def _begin(self) -> None:
        # Not on import, which must have no effect outside this package.
        import atexit
        import time

        if self._pid is None:
            os.register_at_fork(after_in_child=self._begin_child)
            atexit.register(self.write_counts)
        self._pid = os.getpid()
        # Process ids are reused. Readers take the last session in a file.
        self._session = f"{self._pid}-{time.time_ns()}"

    def _begin_child(self) -> None:
        self._begin()
        self._write(lambda: map(_without_counts, self._history()))
        util = sys.modules.get("multiprocessing.util")
        if util is not None:  # its children end without atexit, and drop what was registered before their start
            util.register_after_fork(self, lambda _: util.Finalize(None, self.write_counts, exitpriority=0))

    def _append(self, folder: str, line: Mapping[str, Any]) -> None:
        import json
        import socket

        host = socket.gethostname()
        ranks = {name: os.environ.get(name.upper(), "") for name in ("rank", "world_size")}  # as torchrun sets them
        about = {name: int(value) for name, value in ranks.items() if value.isdecimal()}
        text = json.dumps({**line, "host": host, "pid": self._pid, "session": self._session, **about}, default=str)
        os.makedirs(folder, exist_ok=True)  # noqa: PTH103 - pathlib would be imported for these two calls alone
        path = os.path.join(folder, f"{host}-{self._pid}.jsonl")  # noqa: PTH118
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(file, f"{text}\n".encode())
        finally:
            os.close(file)


@dataclass(frozen=True, kw_only=True, order=True)
class Application:
    """One patch in one process, without the details that may differ between equal processes."""

    id: str
    target: str
    state: str
    scope: str
    """`process` or `instances`, without their number, which depends on the process's share of a model."""
    verdict: str
    owner: str
    calls: int | None = field(default=None, compare=False)
    """Number of calls until the process ended; None if they were not counted, or it was killed."""
    passed: int | None = field(default=None, compare=False)
    """Number of those that the patch passed through."""
    note: str = field(default="", compare=False)
    """Reason for the state."""

    def __str__(self) -> str:
        return f"{self.state}, {self.scope}, {self.verdict}, {self.owner}"


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process, with the last state of each of its receipts."""

    host: str
    pid: int
    rank: int | None
    world_size: int | None
    applications: tuple[Application, ...]
    """Applications, sorted, without reverted ones whose calls were not counted."""

    @property
    def name(self) -> str:
        """`rank N`, if a launcher set it, with host and process id."""
        place = f"{self.host}-{self.pid}"
        return place if self.rank is None else f"rank {self.rank} ({place})"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One id that differs between processes: the applications of each process as joined text, or empty."""

    id: str
    by_process: Mapping[str, str]

    def __str__(self) -> str:
        groups: dict[str, list[str]] = {}
        for process, found in self.by_process.items():
            groups.setdefault(found or "not active", []).append(process)
        return f"{self.id} differs: " + "; ".join(f"{found} in {', '.join(names)}" for found, names in groups.items())


class Processes(tuple[Process, ...]):
    """The processes that kept a journal, by rank, then host. `str()` puts them side by side."""

    __slots__ = ()

    @property
    def differences(self) -> tuple[Difference, ...]:
        """Every id that differs between processes, or is missing in some; not where it waits for its module."""
        differing = []
        for patch_id in sorted({one.id for process in self for one in process.applications}):
            found = {one.name: text for one in self if (text := _summary(one, patch_id)) != _WAITS}
            if len({*found.values()}) > 1:
                differing.append(Difference(id=patch_id, by_process=found))
        # Ranks within the world size have no journal if they have patched nothing.
        world = max((one.world_size or 0 for one in self), default=0)
        silent = sorted({*range(world)} - {one.rank for one in self})
        if silent:
            absent = dict.fromkeys((f"rank {rank}" for rank in silent), "no journal")
            present = dict.fromkeys((one.name for one in self), "a journal")
            differing.append(Difference(id="(journal)", by_process={**present, **absent}))
        return tuple(differing)

    @property
    def failures(self) -> tuple[str, ...]:
        """A line for each reason why a patch that waited for its module could not be applied."""
        failed = [one for process in self for one in process.applications if one.state == _FAILED]
        ids: dict[str, set[str]] = {}
        for one in failed:
            ids.setdefault(one.note, set()).add(one.id)
        return tuple(f"{', '.join(sorted(ids[note]))} failed: {note}" for note in ids)

    def __str__(self) -> str:
        from .ledger import aligned  # which writes journals

        if not self:
            return "no process has kept a journal here"
        found = [one for process in self for one in process.applications]
        resolved = {one.id for one in found if one.state != _WAITS}  # of several targets, by the processes that have it
        rows = sorted({(one.id, one.target) for one in found if one.state != _WAITS or one.id not in resolved})
        table = [(*row, *(_state(process, *row) for process in self)) for row in rows]
        header = ("id", "target", *(process.name for process in self))
        return "\n".join([aligned(header, table), *map(str, self.differences), *self.failures])

    def to_json(self) -> str:
        """A JSON object: `processes`, a list with one object per process, and `differences`."""
        import json

        processes = [asdict(one) for one in self]
        differences = [asdict(one) for one in self.differences]
        return json.dumps({"processes": processes, "differences": differences}, indent=2)


def read_journals(folder: Path) -> Processes:
    """Read the patches of every process that ran with `PATCHES_JOURNAL=folder`, as of its last line.

    If a process id was reused, the last process counts. Raises JournalError if there is no journal, or a line is not
    valid; the last line of a file may be incomplete.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        why = f"expected files named <host>-<pid>.jsonl in {str(folder)!r}, found none"
        raise JournalError(f"{why}; run the processes with PATCHES_JOURNAL={folder}", path=str(folder))
    processes = [process for process in map(_read, files) if process is not None]
    return Processes(sorted(processes, key=lambda one: (one.rank is None, one.rank or 0, one.host, one.pid)))


def _read(file: Path) -> Process | None:
    lines = _parse(file)
    if not lines:
        return None
    last = lines[-1]
    # Later lines replace earlier ones of the same receipt.
    latest = {line["serial"]: line for line in lines if line["session"] == last["session"]}.values()
    # A reverted patch has no effect left, unless its calls tell what it did.
    shown = (line for line in latest if line["state"] != _REVERTED or line.get("calls") is not None)
    return Process(
        host=last["host"],
        pid=last["pid"],
        rank=last.get("rank"),
        world_size=last.get("world_size"),
        applications=tuple(sorted(map(_application, shown))),
    )


def _parse(file: Path) -> list[dict[str, Any]]:
    import json

    texts = file.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = []
    # The text after the last line break is empty, or was being written when the process was killed.
    for number, text in enumerate(texts[:-1], 1):
        try:
            line = json.loads(text)
            lines.append({**line, **{name: line[name] for name in _REQUIRED}})
        except (ValueError, TypeError, KeyError) as error:
            why = f"{file}:{number} is not a line of a journal ({error!r}); remove it"
            raise JournalError(why, path=str(file)) from error
    return lines


def _without_counts(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """A line, without the counts of this moment, unless they are final: a killed process writes no others."""
    return line if line["state"] == _REVERTED else {**line, "calls": None, "passed": None}


def _application(line: Mapping[str, Any]) -> Application:
    scope = "process" if line["scope"] == "process" else "instances"
    plain = {name: line[name] for name in ("id", "target", "state", "verdict", "owner")}
    note = line.get("note") or ""
    return Application(**plain, scope=scope, calls=line.get("calls"), passed=line.get("passed"), note=note)


def _summary(process: Process, patch_id: str) -> str:
    found = [one for one in process.applications if one.id == patch_id]
    if any(one.state == _WAITS for one in found):
        return _WAITS
    return " + ".join(dict.fromkeys(str(one) for one in found if one.state != _REVERTED))


def _state(process: Process, patch_id: str, target: str) -> str:
    found = [
        one for one in process.applications if one.id == patch_id and (one.target == target or one.state == _WAITS)
    ]
    return " + ".join(dict.fromkeys(f"{one.state} ({one.scope}){_calls(one)}" for one in found)) or "-"


def _calls(one: Application) -> str:
    passed = f", {one.passed} passed" if one.passed else ""
    return "" if one.calls is None else f", {one.calls} calls{passed}"
