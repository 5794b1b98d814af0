"""`--patches-bisect`: find the active patch that breaks a failing test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest

from .reduce import smallest_cause
from .rerun import Rerun, RerunError
from .session import SessionPatches

__all__ = ["Bisection", "explain"]


class Bisection:
    """Collector of failing tests, which runs each again under fewer patches once all tests are done."""

    def __init__(self, session_patches: SessionPatches, rerun: Rerun) -> None:
        self._session_patches = session_patches
        self._rerun = rerun
        self._failed: dict[str, None] = {}

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record a failed test, whichever phase failed."""
        if report.failed:
            self._failed[report.nodeid] = None

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Find and print the cause of each failure."""
        if not self._failed:
            return
        terminalreporter.section("patches bisect")
        for nodeid in self._failed:
            before = self._rerun.count
            found = explain(self._session_patches.ids, partial(self._rerun.fails, nodeid))
            terminalreporter.line(f"{nodeid}: {found} ({self._rerun.count - before} runs)")


def explain(ids: Sequence[str], fails: Callable[[tuple[str, ...]], bool]) -> str:
    """Explain a test failure under the patches `ids`; `fails` runs the test under a subset of them."""
    try:
        if fails(()):
            return "fails without any patch too"
        if not ids or not fails(tuple(ids)):
            return "passes when it runs alone under the same patches: its order or another test matters"
        cause = smallest_cause(ids, fails)
    except RerunError as error:
        return f"could not be bisected: {error}"
    return f"broken by {cause[0]}" if len(cause) == 1 else f"broken by {' and '.join(cause)} together"
