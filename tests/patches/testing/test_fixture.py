from __future__ import annotations

import pytest

from .suite import run, write_project

pytest_plugins = ("pytester",)


@pytest.fixture(autouse=True)
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    write_project(pytester, monkeypatch)


def test_patched_lasts_as_long_as_the_test(pytester: pytest.Pytester) -> None:
    suite = """
    import lib
    import patches

    stock = vars(lib)["double"]

    def test_effect(patched):
        made = patched("lib.plus-one")
        assert lib.double(2) == 5
        assert [receipt.id for receipt in made.receipts] == ["lib.plus-one"]
        (receipt,) = patches.active()
        assert receipt.by.endswith("test_suite.py:7")
        assert "test_effect" in receipt.reason

    def test_restored():
        assert vars(lib)["double"] is stock
        assert not patches.active()
    """
    run(pytester, suite).assert_outcomes(passed=2)


def test_patched_is_limited_to_instances_and_taken_back_in_any_order(pytester: pytest.Pytester) -> None:
    suite = """
    import lib

    def test_effect(patched):
        covered, other = lib.Box(), lib.Box()
        first = patched("lib.big-box", on=[covered])
        patched("lib.plus-one", "lib.negated")
        assert (covered.size(), other.size()) == (100, 1)
        first.rollback()
        assert covered.size() == 1
        assert (lib.double(2), lib.triple(2)) == (5, -6)
    """
    run(pytester, suite).assert_outcomes(passed=1)


def test_an_obsolete_patch_is_not_skipped_in_silence(pytester: pytest.Pytester) -> None:
    suite = """
    import lib

    def test_skipped(patched):
        patched("lib.obsolete")

    def test_forced(patched):
        patched("lib.obsolete", force=True)
        assert lib.double(2) == 0
    """
    result = run(pytester, suite)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*obsolete here: lib.obsolete: the probe does not see the defect*force=True*"])


def test_a_failing_application_leaves_the_fixture_usable(pytester: pytest.Pytester) -> None:
    suite = """
    import lib
    import patches
    import pytest

    def test_effect(patched):
        with pytest.raises(patches.UnknownPatchError):
            patched("lib.nothing")
        patched("lib.plus-one")
        assert lib.double(2) == 5
    """
    run(pytester, suite).assert_outcomes(passed=1)
