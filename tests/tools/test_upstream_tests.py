"""`tools/upstream_tests.py`: a suite is run twice, and a test that ends differently is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from upstream.suites import Suite, SuiteError, differences, extract

ROOT = Path(__file__).parents[2]

SUITE = """
import json
import pytest

def test_same(): assert json.loads("1") == 1
def test_fails_either_way(): assert False
def test_skipped(): pytest.skip("no GPU")
@pytest.mark.parametrize("value", [1, 2])
def test_text(value): assert json.dumps([value, value]) == f"[{value}, {value}]"
"""

PATCH = """
import patches

@patches.register("fake.compact", target="json:dumps", reason="a test")
def compact(wrapped, instance, args, kwargs):
    return wrapped(*args, separators=(",", ":"), **kwargs)
"""


# The three runs are one after the other in the same folder: as it is, patched, as it is.
UNSTABLE = """
from pathlib import Path

def test_first_run_only():
    seen = Path(__file__).with_name("seen")
    first = not seen.exists()
    seen.touch()
    assert first
"""

OVERWRITES = """
import json

def test_overwrites(): json.dumps = print
"""


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """A repository whose tests are committed, beside a package that must not be imported."""
    repository = tmp_path / "upstream"
    (repository / "tests").mkdir(parents=True)
    (repository / "tests" / "__init__.py").touch()
    (repository / "tests" / "test_json.py").write_text(SUITE)
    (repository / "tests" / "test_unstable.py").write_text(UNSTABLE)
    (repository / "tests" / "test_overwrites.py").write_text(OVERWRITES)
    (repository / "json.py").write_text("raise ImportError('the source was imported')")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "tests"]):
        subprocess.run([*git, *command], check=True)
    return repository


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A distribution with one patch, installed in a folder of its own."""
    folder = tmp_path / "beside"
    information = folder / "fake_patches-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "fake_patches.py").write_text(PATCH)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-patches\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[patches.registry]\nfake.compact = fake_patches\n")
    return folder


def run(tmp_path: Path, upstream: Path, beside: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        ROOT / "tools" / "upstream_tests.py",
        upstream,
        "HEAD",
        "--beside",
        ROOT,
        "--beside",
        beside,
    ]
    command += ["--ids", "fake.compact", "--", *options]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)


def test_a_test_that_ends_differently_is_named(tmp_path: Path, upstream: Path, beside: Path) -> None:
    ran = run(tmp_path, upstream, beside, "tests/test_json.py")
    assert ran.returncode == 1
    assert "stock: 5 tests: 1 failed, 3 passed, 1 skipped" in ran.stdout
    assert "patched: 5 tests: 3 failed, 1 passed, 1 skipped" in ran.stdout
    assert "patches: fake.compact" in ran.stdout
    assert "DIFFERS tests.test_json::test_text[1]: passed without patches, failed with them" in ran.stdout
    assert "2 of 5 tests end differently" in ran.stdout


def test_a_test_that_differs_without_patches_too_is_unstable(tmp_path: Path, upstream: Path, beside: Path) -> None:
    ran = run(tmp_path, upstream, beside, "tests/test_unstable.py")
    assert ran.returncode == 0, ran.stderr
    assert "stock again: 1 tests: 1 failed" in ran.stdout
    assert "UNSTABLE tests.test_unstable::test_first_run_only: passed without patches, failed with them" in ran.stdout
    assert "0 of 1 tests end differently; 1 unstable" in ran.stdout


def test_a_suite_that_overwrites_a_patch_is_said(tmp_path: Path, upstream: Path, beside: Path) -> None:
    ran = run(tmp_path, upstream, beside, "tests/test_overwrites.py")
    assert ran.returncode == 1
    assert "SuiteError: not restored at the end of the run: 'json:dumps' is overwritten" in ran.stderr


def test_options_reach_pytest(tmp_path: Path, upstream: Path, beside: Path) -> None:
    ran = run(tmp_path, upstream, beside, "tests/test_json.py", "-k", "same or either")
    assert ran.returncode == 0, ran.stderr
    assert "0 of 2 tests end differently" in ran.stdout


def test_tests_that_cannot_be_collected_are_no_agreement(tmp_path: Path, upstream: Path, beside: Path) -> None:
    ran = run(tmp_path, upstream, beside, "tests/test_json.py", "-k", "no_such_test")
    assert ran.returncode == 1
    assert "SuiteError: pytest exited with 5" in ran.stderr


def test_tests_that_are_not_there_are_said(tmp_path: Path, upstream: Path) -> None:
    with pytest.raises(SuiteError, match="has no tests as of no-such-tag"):
        extract(upstream, "no-such-tag", tmp_path / "out")


def test_a_decorator_can_be_left_out(tmp_path: Path, upstream: Path) -> None:
    place = extract(upstream, "HEAD", tmp_path / "out", undecorated=('pytest.mark.parametrize("value", [1, 2])',))
    kept = (place / "tests" / "test_json.py").read_text()
    assert "@" in SUITE
    assert "@" not in kept
    assert "def test_text(value)" in kept


def test_a_test_that_only_one_run_has_is_a_difference() -> None:
    one, two = (Suite(outcomes=found, header=()) for found in ({"a": "passed", "b": "passed"}, {"a": "passed"}))
    assert differences(one, two) == [("b", "passed", "absent")]
    assert differences(one, one) == []
