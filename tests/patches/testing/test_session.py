from __future__ import annotations

import pytest

from .suite import run, write_project

pytest_plugins = ("pytester",)

STOCK = """
import lib

AT_COLLECTION = lib.double(2)

def test_double():
    assert (AT_COLLECTION, lib.double(2)) == (4, 4)

def test_triple():
    assert lib.triple(2) == 6
"""


@pytest.fixture(autouse=True)
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    write_project(pytester, monkeypatch)


def test_a_suite_runs_under_patches_from_before_collection(pytester: pytest.Pytester) -> None:
    run(pytester, STOCK).assert_outcomes(passed=2)
    result = run(pytester, STOCK, "--patches", "lib.plus-one, lib.obsolete")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["patches: lib.plus-one", "patches: lib.obsolete skipped, *", "*assert (5, 5) == (4, 4)"]
    )


def test_an_id_that_nobody_knows_is_a_usage_error(pytester: pytest.Pytester) -> None:
    result = run(pytester, STOCK, "--patches", "lib.plus-oen")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--patches: no patch has the id 'lib.plus-oen'; did you mean lib.plus-one?"])


def test_a_test_that_undoes_them_ends_the_run(pytester: pytest.Pytester) -> None:
    suite = """
    import patches

    def test_first():
        patches.revert("lib.plus-one")

    def test_second():
        raise AssertionError("it would run without the patch")
    """
    result = run(pytester, suite, "--patches", "lib.plus-one")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["this test undid lib.plus-one, applied by --patches"])


def test_what_cannot_be_restored_at_the_end_fails_the_run(pytester: pytest.Pytester) -> None:
    suite = """
    import lib

    def test_overwrites():
        lib.double = lambda x: x
    """
    result = run(pytester, suite, "--patches", "lib.plus-one")
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["not restored at the end of the run: *lib:double*"])


def test_workers_of_xdist_have_them_too(pytester: pytest.Pytester) -> None:
    result = run(pytester, STOCK, "--patches", "lib.negated", "-p", "xdist", "-n", "1")
    result.assert_outcomes(passed=1, failed=1)


def test_pytest_finds_the_plugin_by_itself(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    pytester.makepyfile(test_suite=STOCK)
    pytester.runpytest_subprocess("--patches", "lib.negated").assert_outcomes(passed=1, failed=1)
