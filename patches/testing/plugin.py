"""The pytest plugin, which pytest loads automatically if this distribution is installed.

- The fixture `patched` applies patches for the length of a test.
- `--patches IDS` runs any test suite under patches; `--patches-bisect` says which of them breaks a test.
- A test that leaves a patch active fails, and the patch is undone.

`-p no:patches` turns all of it off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TypeAlias

import pytest

from ..plan import Item
from ..transaction import Transaction, transaction
from .bisect import Bisection
from .leaks import LeakDetector
from .rerun import Rerun
from .session import SessionPatches

__all__ = ["Patched", "patched", "pytest_addoption", "pytest_configure"]

Patched: TypeAlias = Callable[..., Transaction]
"""The type of the fixture `patched`, for annotations."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The command line options."""
    group = parser.getgroup("patches", "reversible patches of other libraries")
    group.addoption(
        "--patches",
        metavar="IDS",
        default="",
        help="run every test with these patches active: what patches.transaction takes, separated by commas",
    )
    group.addoption(
        "--patches-bisect",
        action="store_true",
        default=False,
        help="with --patches: find which of them breaks a failing test, by running it again under fewer",
    )
    group.addoption(
        "--no-patches-bisect",
        action="store_false",
        dest="patches_bisect",
        help="undo --patches-bisect, if the configuration has it",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Install the parts of the plugin that the options select."""
    config.pluginmanager.register(LeakDetector(), "patches-leaks")
    selectors = [part.strip() for part in config.getoption("patches").split(",") if part.strip()]
    bisecting = config.getoption("patches_bisect")
    if bisecting and not selectors:
        raise pytest.UsageError("--patches-bisect needs --patches: there is nothing to choose from")
    if not selectors:
        return
    session_patches = SessionPatches(selectors)
    config.pluginmanager.register(session_patches, "patches-session")
    # A worker of pytest-xdist reports to its controller, which bisects.
    if bisecting and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Bisection(session_patches, Rerun(config)), "patches-bisection")


@pytest.fixture
def patched(request: pytest.FixtureRequest) -> Iterator[Patched]:
    """`patched(*items, on=None, force=False)` applies patches until the test ends; returns the transaction.

    Takes the same items as `patches.transaction`. Fails the test if a patch is obsolete, since its effect would
    not be tested; `force=True` applies it anyway.
    """
    with ExitStack() as stack:

        def apply(*items: Item, on: Iterable[object] | None = None, force: bool = False) -> Transaction:
            made = transaction(*items, reason=f"test {request.node.nodeid}", on=on, force=force)
            entered = stack.enter_context(made)
            if entered.skipped:
                grounds = "; ".join(f"{receipt.id}: {receipt.verdict.why}" for receipt in entered.skipped)
                pytest.fail(f"not applied, obsolete here: {grounds}; to test it all the same, pass force=True")
            return entered

        yield apply
