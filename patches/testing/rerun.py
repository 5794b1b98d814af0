"""Rerun of one test in a new process, under chosen patches."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Final

import pytest

__all__ = ["Rerun", "RerunError"]

_TIMEOUT: Final = 1800


class RerunError(Exception):
    """The test neither passed nor failed: pytest could not run it, or it took too long."""


class Rerun:
    """Runner of this session's tests with the same options but other patches.

    Each runs in a new process, since changes by a patch at import, in a cache, or in a fixture of a wider scope
    would otherwise remain.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._cache = tempfile.TemporaryDirectory(prefix="patches-bisect-")
        self.count = 0
        """Number of runs so far."""

    def fails(self, nodeid: str, ids: Iterable[str]) -> bool:
        """Whether the test fails under these patches and those they need. Raises RerunError."""
        self.count += 1
        command = [sys.executable, "-m", "pytest", *self._options(), *self._overrides(ids), self._path(nodeid)]
        where = self._config.invocation_params.dir
        try:
            ran = subprocess.run(  # noqa: S603 - the command that is already running
                command,
                cwd=where,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RerunError(f"it took longer than {_TIMEOUT} seconds") from error
        if ran.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            last = [line for line in (ran.stdout + ran.stderr).splitlines() if line.strip()][-3:]
            raise RerunError(f"pytest exited with {ran.returncode}: {' / '.join(last)}")
        return ran.returncode == pytest.ExitCode.TESTS_FAILED

    def _options(self) -> list[str]:
        """The command line options of this session, without the selected tests."""
        arguments = list(map(str, self._config.invocation_params.args))
        for chosen in reversed(self._config.getoption("file_or_dir")):
            # From the end, because the same word may be the value of an earlier option.
            position = _last_index(arguments, chosen)
            if position is not None:
                del arguments[position]
        return [argument for argument in arguments if argument not in ("--pdb", "--trace")]

    def _overrides(self, ids: Iterable[str]) -> list[str]:
        # Later options win, even over addopts. No shared cache, because this run must not become "last failed".
        overrides = ["--patches", ",".join(ids), "--no-patches-bisect", "-o", f"cache_dir={self._cache.name}"]
        overrides += ["--junit-xml", f"{self._cache.name}/report.xml"] if self._has("junitxml") else []
        return overrides + (["-n0"] if self._has("xdist") else [])

    def _has(self, plugin: str) -> bool:
        return bool(self._config.pluginmanager.hasplugin(plugin))

    def _path(self, nodeid: str) -> str:
        return f"{self._config.rootpath}/{nodeid}"


def _last_index(arguments: Sequence[str], wanted: str) -> int | None:
    return next((index for index in range(len(arguments) - 1, -1, -1) if arguments[index] == wanted), None)
