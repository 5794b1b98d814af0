from __future__ import annotations

import pytest

from patches.testing.bisect import explain
from patches.testing.rerun import RerunError

from .suite import run, write_project

pytest_plugins = ("pytester",)

ALL = "lib.plus-one,lib.negated,lib.big-box"
SUITE = """
import lib
import pytest

seen = []

def test_one():
    assert lib.double(2) == 4

@pytest.mark.parametrize("x", [2], ids=["a/b c"])
def test_two_together(x):
    assert not (lib.double(x) == 5 and lib.triple(x) == -6)

def test_always():
    seen.append(1)
    assert False

def test_passes():
    assert True

def test_depends_on_another():
    assert not seen
"""


@pytest.fixture(autouse=True)
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    write_project(pytester, monkeypatch)


def test_each_failure_is_explained(pytester: pytest.Pytester) -> None:
    result = run(pytester, SUITE, "--patches", ALL, "--patches-bisect", "test_suite.py")
    result.assert_outcomes(passed=1, failed=4)
    result.stdout.fnmatch_lines([
        "*patches bisect*",
        "test_suite.py::test_one: broken by lib.plus-one (* runs)",
        "test_suite.py::test_two_together*: broken by lib.plus-one and lib.negated together (* runs)",
        "test_suite.py::test_always: fails without any patch too (1 runs)",
        "test_suite.py::test_depends_on_another: passes when it runs alone*",
    ])  # fmt: skip


def test_options_from_the_configuration_are_overridden(pytester: pytest.Pytester) -> None:
    pytester.makeini(f"[pytest]\naddopts = --patches {ALL} --patches-bisect --junit-xml report.xml\n")
    result = run(pytester, SUITE, "-k", "test_one")
    result.stdout.fnmatch_lines(["test_suite.py::test_one: broken by lib.plus-one (* runs)"])
    assert "test_one" in (pytester.path / "report.xml").read_text()
    assert 'failures="1"' in (pytester.path / "report.xml").read_text()


def test_nothing_is_said_where_nothing_fails(pytester: pytest.Pytester) -> None:
    result = run(pytester, SUITE, "--patches", ALL, "--patches-bisect", "-k", "passes")
    result.assert_outcomes(passed=1, deselected=4)
    result.stdout.no_fnmatch_line("*patches bisect*")


def test_bisecting_needs_patches(pytester: pytest.Pytester) -> None:
    result = run(pytester, SUITE, "--patches-bisect")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--patches-bisect needs --patches*"])


def test_what_cannot_be_run_again_is_said() -> None:
    def fails(ids: tuple[str, ...]) -> bool:
        raise RerunError("pytest exited with 5: nothing collected")

    assert explain(("a.b",), fails) == "could not be bisected: pytest exited with 5: nothing collected"
