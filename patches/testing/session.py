"""`--patches IDS`: run any test suite with patches active from before collection to the end."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import pytest

from ..errors import PatchError, UndoError
from ..transaction import Transaction, transaction
from ..undo import active

__all__ = ["SessionPatches"]


class SessionPatches:
    """Patches for the whole test session. Obsolete ones are skipped, and the header says so."""

    def __init__(self, selectors: Sequence[str]) -> None:
        self._transaction: Transaction = transaction(*selectors, reason="pytest --patches")
        self._problem = ""

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the applied patches, in order."""
        return tuple(receipt.id for receipt in self._transaction.receipts)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Apply the patches before the header is printed and any test module is imported."""
        try:
            self._transaction.__enter__()
        except PatchError as error:
            raise pytest.UsageError(f"--patches: {error}") from error

    @pytest.hookimpl
    def pytest_report_header(self) -> list[str]:
        """List the active patches, and requested ones that are not active."""
        lines = [f"patches: {', '.join(self.ids) or 'none is active'}"]
        lines += [f"patches: {skipped.id} skipped, {skipped.verdict.why}" for skipped in self._transaction.skipped]
        return lines

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Fail a test that has undone one of these patches, and stop: all later tests would run without it."""
        result = yield
        live = active()
        lost = [receipt.id for receipt in self._transaction.receipts if receipt not in live]
        if lost:
            item.session.shouldfail = f"{item.nodeid} undid {', '.join(lost)}, applied by --patches"
            pytest.fail(f"this test undid {', '.join(lost)}, applied by --patches", pytrace=False)
        return result

    @pytest.hookimpl
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Undo everything. The run fails if somebody else has changed a place in the meantime."""
        try:
            self._transaction.rollback()
        except UndoError as error:
            self._problem = "; ".join(str(problem) for problem in error.exceptions)
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Report the patches that could not be undone."""
        if self._problem:
            terminalreporter.section("patches")
            terminalreporter.line(f"not restored at the end of the run: {self._problem}")
