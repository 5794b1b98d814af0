"""Comparison of the journals of all processes of a job."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, overload

from .errors import JournalError
from .ledger import State
from .table import aligned

__all__ = ["Application", "Difference", "Process", "Processes", "read_journals"]

# A patch in one of these states has no effect left, or never had one.
_GONE: Final = (State.REVERTED,)


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
    """Applications, sorted, without reverted ones."""

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


class Processes(Sequence[Process]):
    """The processes that kept a journal, by rank, then host. `str()` puts them side by side."""

    def __init__(self, processes: Iterable[Process]) -> None:
        self._processes = tuple(sorted(processes, key=lambda one: (one.rank is None, one.rank or 0, one.host, one.pid)))

    def __len__(self) -> int:
        return len(self._processes)

    @overload
    def __getitem__(self, index: int) -> Process: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Process]: ...
    def __getitem__(self, index: int | slice) -> Process | Sequence[Process]:
        return self._processes[index]

    @property
    def differences(self) -> tuple[Difference, ...]:
        """Every id that differs between processes, or is missing in some."""
        ids = sorted({one.id for process in self._processes for one in process.applications})
        columns = {patch_id: {one.name: _cell(one, patch_id) for one in self._processes} for patch_id in ids}
        differing = [
            Difference(id=key, by_process=cells) for key, cells in columns.items() if len({*cells.values()}) > 1
        ]
        silent = self._silent_ranks()
        if silent:
            absent = dict.fromkeys((f"rank {rank}" for rank in silent), "no journal")
            present = dict.fromkeys((one.name for one in self._processes), "a journal")
            differing.append(Difference(id="(journal)", by_process={**present, **absent}))
        return tuple(differing)

    def _silent_ranks(self) -> list[int]:
        """The ranks within the world size that have no journal, because they have patched nothing."""
        world = max((one.world_size or 0 for one in self._processes), default=0)
        heard = {one.rank for one in self._processes}
        return [rank for rank in range(world) if rank not in heard]

    def __str__(self) -> str:
        if not self._processes:
            return "no process has kept a journal here"
        rows = sorted({(one.id, one.target) for process in self._processes for one in process.applications})
        table = [(*row, *(_state(process, *row) for process in self._processes)) for row in rows]
        header = ("id", "target", *(process.name for process in self._processes))
        return "\n".join([aligned(header, table), *map(str, self.differences)])

    def to_json(self) -> str:
        """A JSON object: `processes`, a list with one object per process, and `differences`."""
        processes = [asdict(one) for one in self._processes]
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
    return Processes(process for process in map(_read, files) if process is not None)


def _read(file: Path) -> Process | None:
    lines = _parse(file)
    if not lines:
        return None
    last = lines[-1]
    # Later lines replace earlier ones of the same receipt.
    states = {line["serial"]: line for line in lines if line["session"] == last["session"]}
    return Process(
        host=last["host"],
        pid=last["pid"],
        rank=last.get("rank"),
        world_size=last.get("world_size"),
        applications=tuple(sorted(_application(line) for line in states.values() if line["state"] not in _GONE)),
    )


def _parse(file: Path) -> list[dict[str, Any]]:
    texts = file.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = []
    # The text after the last line break is empty, or was being written when the process was killed.
    for number, text in enumerate(texts[:-1], 1):
        try:
            line = json.loads(text)
            lines.append({**line, **{name: line[name] for name in _REQUIRED}})
        except (ValueError, TypeError, KeyError) as error:
            where = f"{file}:{number}"
            raise JournalError(f"{where} is not a line of a journal ({error!r}); remove it", path=str(file)) from error
    return lines


_REQUIRED: Final = ("serial", "id", "target", "state", "scope", "verdict", "owner", "host", "pid", "session")


def _application(line: Mapping[str, Any]) -> Application:
    return Application(
        id=line["id"],
        target=line["target"],
        state=line["state"],
        scope="process" if line["scope"] == "process" else "instances",
        verdict=line["verdict"],
        owner=line["owner"],
    )


def _cell(process: Process, patch_id: str) -> str:
    return " + ".join(dict.fromkeys(str(one) for one in process.applications if one.id == patch_id))


def _state(process: Process, patch_id: str, target: str) -> str:
    found = [one for one in process.applications if (one.id, one.target) == (patch_id, target)]
    return " + ".join(dict.fromkeys(f"{one.state} ({one.scope})" for one in found)) or "-"
