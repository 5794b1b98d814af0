from __future__ import annotations

import pytest

from .suite import run, write_project

pytest_plugins = ("pytester",)


@pytest.fixture(autouse=True)
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    write_project(pytester, monkeypatch)


def test_the_test_that_leaks_fails_and_the_next_one_is_clean(pytester: pytest.Pytester) -> None:
    suite = """
    import lib
    import patches

    def test_leaks():
        with patches.transaction("lib.plus-one", reason="forgotten") as tx:
            tx.commit()

    def test_next():
        assert lib.double(2) == 4
        assert not patches.active()
    """
    result = run(pytester, suite)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_leaks*", "this test left 1 patch active, undone now:"])
    result.stdout.fnmatch_lines(["*lib.plus-one (lib:double, process), applied at *test_suite.py:5: forgotten"])


def test_fixtures_of_a_wider_scope_may_keep_patches_until_their_end(pytester: pytest.Pytester) -> None:
    suite = """
    import lib
    import patches
    import pytest

    @pytest.fixture(scope="module")
    def stretched():
        with patches.transaction("lib.plus-one", reason="the module"):
            yield

    def setup_module():
        with patches.transaction("lib.negated", reason="the module") as tx:
            tx.commit()

    def teardown_module():
        patches.revert("lib.negated")

    def test_first(stretched):
        assert lib.double(2) == 5

    def test_second():
        assert (lib.double(2), lib.triple(2)) == (5, -6)
    """
    run(pytester, suite).assert_outcomes(passed=2)


def test_a_fixture_of_a_wider_scope_that_leaks_is_found_when_it_ends(pytester: pytest.Pytester) -> None:
    suite = """
    import patches
    import pytest

    @pytest.fixture(scope="module")
    def leaking():
        with patches.transaction("lib.plus-one", reason="forgotten") as tx:
            tx.commit()
        yield

    def test_first(leaking):
        pass

    def test_last():
        pass
    """
    result = run(pytester, suite)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_last*", "*lib.plus-one*forgotten"])


def test_a_test_that_fails_anyway_fails_once(pytester: pytest.Pytester) -> None:
    suite = """
    import patches

    def test_leaks():
        with patches.transaction("lib.plus-one", reason="forgotten") as tx:
            tx.commit()
        assert False

    def test_next():
        assert not patches.active()
    """
    result = run(pytester, suite)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["this test left 1 patch active*"])


def test_a_patch_on_garbage_is_no_leak(pytester: pytest.Pytester) -> None:
    suite = """
    import gc
    import lib
    import patches

    def test_cycle():
        gc.disable()
        box = lib.Box()
        box.itself = box
        with patches.transaction("lib.big-box", reason="resident", on=[box]) as tx:
            tx.commit()
        assert box.size() == 100
    """
    run(pytester, suite).assert_outcomes(passed=1)


def test_what_cannot_be_restored_is_named(pytester: pytest.Pytester) -> None:
    suite = """
    import lib
    import patches

    def test_buried():
        with patches.transaction("lib.plus-one", reason="forgotten") as tx:
            tx.commit()
        lib.double = lambda x: x
    """
    result = run(pytester, suite)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*not restored: *lib:double*"])
