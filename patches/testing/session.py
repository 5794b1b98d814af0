"""`--patches IDS`: any test suite, with patches active from before its tests are collected to its end."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import pytest

from patches.errors import PatchError, UndoError
from patches.transaction import Transaction, transaction
from patches.undo import active

__all__ = ["SessionPatches"]


class SessionPatches:
    """Applies the patches for the whole process. What is obsolete is skipped, and the header says so."""

    def __init__(self, selectors: Sequence[str]) -> None:
        self._transaction: Transaction = transaction(*selectors, reason="pytest --patches")
        self._problem = ""

    @property
    def ids(self) -> tuple[str, ...]:
        """What was applied, in order."""
        return tuple(receipt.id for receipt in self._transaction.receipts)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Apply before the header is printed and any test module is imported."""
        try:
            self._transaction.__enter__()
        except PatchError as error:
            raise pytest.UsageError(f"--patches: {error}") from error

    @pytest.hookimpl
    def pytest_report_header(self) -> list[str]:
        """Say what is active, and what is not although it was asked for."""
        lines = [f"patches: {', '.join(self.ids) or 'none is active'}"]
        lines += [f"patches: {skipped.id} skipped, {skipped.verdict.why}" for skipped in self._transaction.skipped]
        return lines

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Fail a test that has undone one of these patches, and stop: all later ones would run without it."""
        result = yield
        live = active()
        lost = [receipt.id for receipt in self._transaction.receipts if receipt not in live]
        if lost:
            item.session.shouldfail = f"{item.nodeid} undid {', '.join(lost)}, applied by --patches"
            pytest.fail(f"this test undid {', '.join(lost)}, applied by --patches", pytrace=False)
        return result

    @pytest.hookimpl
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Undo everything. What somebody has changed in the meantime fails the run."""
        try:
            self._transaction.rollback()
        except UndoError as error:
            self._problem = "; ".join(str(problem) for problem in error.exceptions)
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what could not be undone."""
        if self._problem:
            terminalreporter.section("patches")
            terminalreporter.line(f"not restored at the end of the run: {self._problem}")
