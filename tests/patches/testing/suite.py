"""A small project with a library, its patches and, in each test, a suite that runs in a process of its own."""

from __future__ import annotations

import pytest

__all__ = ["run", "write_project"]

LIBRARY = """
def double(x):
    return 2 * x

def triple(x):
    return 3 * x

class Box:
    def size(self):
        return 1
"""

PATCHES = """
import patches

@patches.register("lib.plus-one", target="lib:double", reason="off by one")
def plus_one(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs) + 1

@patches.register("lib.negated", target="lib:triple", reason="wrong sign")
def negated(wrapped, instance, args, kwargs):
    return -wrapped(*args, **kwargs)

@patches.register("lib.big-box", target="lib:Box.size", reason="too small")
def big_box(wrapped, instance, args, kwargs):
    return 100

@patches.register("lib.obsolete", target="lib:double", reason="fixed long ago", probe=lambda: False)
def obsolete(wrapped, instance, args, kwargs):
    return 0
"""


def write_project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the library and its patches; of installed plugins, suites then load only what they name."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # half of the time that a run takes
    pytester.makepyfile(lib=LIBRARY, lib_patches=PATCHES)
    pytester.makeconftest("import lib_patches")


def run(pytester: pytest.Pytester, suite: str, *options: str) -> pytest.RunResult:
    pytester.makepyfile(test_suite=suite)
    return pytester.runpytest_subprocess("-p", "patches.testing.plugin", *options)
