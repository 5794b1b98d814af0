"""The leak detector: a test that leaves a patch active fails, and the patch is undone before the next test."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterable
from typing import Any

import pytest

from ..activation import ACTIVATIONS
from ..errors import UndoError
from ..ledger import Receipt
from ..undo import active, revert

__all__ = ["LeakDetector"]


class LeakDetector:
    """Comparison of the patches active before a test and after its teardown.

    Patches that a fixture of a wider scope applies during setup may stay until that fixture is torn down.
    """

    def __init__(self) -> None:
        self._before: frozenset[Receipt] = frozenset()
        self._held: dict[object, set[Receipt]] = {}
        """Fixture definition -> receipts applied during its setup."""
        self._failed = False

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
        """Record the patches that a fixture of wider scope than the test applies."""
        before = set(active())
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                self._held.setdefault(fixturedef, set()).update(set(active()) - before)

    @pytest.hookimpl
    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """Forget the patches of a fixture that is torn down."""
        self._held.pop(fixturedef, None)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, Any, Any]:
        """Record the patches active before the test, except those of fixtures, which may end with this test."""
        self._before = frozenset([*active(), *ACTIVATIONS.pending.receipts()]).difference(*self._held.values())
        self._failed = False
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Record whether the test has failed already."""
        report = yield
        self._failed = self._failed or report.failed
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Undo patches that the test left active, and fail it; if it failed already, add a report section instead."""
        try:
            result = yield
        except BaseException as error:
            for line in self._undone():
                error.add_note(line)
            raise
        lines = self._undone()
        if lines and self._failed:
            # Not another failure: objects that the traceback keeps alive also keep their patches.
            item.add_report_section("teardown", "patches", "\n".join(lines))
        elif lines:
            pytest.fail("\n".join(lines), pytrace=False)
        return result

    def _undone(self) -> list[str]:
        """Undo leaked patches; returns the lines to report, empty if there were none."""
        leaked = self._leaked()
        if any(receipt.scope is not None for receipt in leaked):
            gc.collect()  # the instances may be garbage in a reference cycle
            leaked = self._leaked()
        if not leaked:
            return []
        lines = [f"this test left {len(leaked)} patch{'es' if len(leaked) > 1 else ''} active, undone now:"]
        lines += [f"  {_described(receipt)}" for receipt in leaked]
        lines += _problems_of_undoing(leaked)
        advice = "use the `patched` fixture, a `with patches.transaction(...)` block, or a fixture of a wider scope"
        return [*lines, advice]

    def _leaked(self) -> list[Receipt]:
        expected = self._before.union(*self._held.values())
        return [receipt for receipt in active() if receipt not in expected]


def _described(receipt: Receipt) -> str:
    return f"{receipt.id} ({receipt.target}, {receipt.scope_text}), applied at {receipt.by}: {receipt.reason}"


def _problems_of_undoing(leaked: Iterable[Receipt]) -> list[str]:
    try:
        revert(*leaked)
    except UndoError as error:
        return [f"  not restored: {problem}" for problem in error.exceptions]
    return []
