from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import patches
from patches.manifest import changes, lock, read, write
from tests.helpers.declare import FUNCTIONS, declare

ROOT = Path(__file__).parents[2]

PROJECT = {
    "mine.py": (
        "import patches\n"
        "@patches.register('late.one', target='late_lib:one', reason='a test', requires={'late-lib': '<2'})\n"
        "def one(wrapped, instance, args, kwargs): return wrapped(*args, **kwargs)\n"
        "@patches.register('late.two', target='late_lib:two', reason='a test', probe=lambda: True)\n"
        "def two(wrapped, instance, args, kwargs): return wrapped(*args, **kwargs)\n"
    ),
    "late_lib.py": "def one(): return 1\ndef two(): return 2\n",
    "late_lib-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: late-lib\nVersion: 1.0\n",
    "late_lib-1.0.dist-info/RECORD": "late_lib.py,,\n",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in PROJECT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def command(project: Path, *arguments: str) -> tuple[int, str]:
    ran = subprocess.run(
        [sys.executable, "-m", "patches", *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return ran.returncode, ran.stdout + ran.stderr


def locked(project: Path) -> Path:
    code, text = command(project, "lock", "late.*", "-o", "patches.lock", "--import", "mine")
    assert (code, text) == (0, "locked late.one, late.two in patches.lock\n")
    return project / "patches.lock"


def test_a_lock_is_stable_and_what_it_says_holds_here(project: Path) -> None:
    text = locked(project).read_text()
    assert command(project, "lock", "late.two", "late.one", "--import", "mine") == (0, text)
    assert json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n" == text
    one = json.loads(text)["patches"][0]
    assert (one["versions"], one["verdict"], len(one["fingerprint"])) == ({"late-lib": "1.0"}, "needed", 16)
    assert command(project, "check", "--lock", "patches.lock") == (0, "everything is as in patches.lock\n")


MOVES: dict[str, tuple[dict[str, tuple[str, str]], tuple[str, ...]]] = {
    "source": (
        {"late_lib.py": ("return 1", "return 1 + 0")},
        ("'late.one': the source of 'late_lib:one' had the fingerprint", "read what has changed"),
    ),
    "version": (
        {"late_lib-1.0.dist-info/METADATA": ("Version: 1.0", "Version: 1.1")},
        ("late-lib was 1.0, and here it is 1.1", "test 'late.one', 'late.two' with it, then lock again"),
    ),
    "verdict": (
        {"mine.py": ("probe=lambda: True", "probe=lambda: False")},
        ("'late.two' was needed, and here it is obsolete", "remove the patch"),
    ),
    "target": (
        {"mine.py": ("target='late_lib:two'", "target='late_lib:one'")},
        ("'late.two' had the target 'late_lib:two', and here it has 'late_lib:one'", "lock again if that is meant"),
    ),
    "gone": (
        {"late_lib.py": ("def two", "def three")},
        ("'late.two' was needed, and here it is incompatible", "adapt it"),
    ),
    "forgotten": (
        {"mine.py": ("'late.two'", "'late.three'")},
        ("'late.two' was declared by 'mine', and is not here", "lock again without it"),
    ),
}


@pytest.mark.parametrize("move", MOVES)
def test_what_has_moved_is_said_in_a_line_each(move: str, project: Path) -> None:
    locked(project)
    changed, says = MOVES[move]
    for name, (old, new) in changed.items():
        (project / name).write_text((project / name).read_text().replace(old, new))
    code, text = command(project, "check", "--lock", "patches.lock")
    assert code == 1
    assert all(part in text for part in says), text
    assert len(text.splitlines()) == (2 if move == "target" else 1)  # another target is another source
    assert "Traceback" not in text


def test_a_patch_that_is_not_in_the_lock_is_a_difference_if_asked_for(project: Path) -> None:
    command(project, "lock", "late.one", "-o", "patches.lock", "--import", "mine")
    assert command(project, "check", "--lock", "patches.lock")[0] == 0
    code, text = command(project, "check", "late.*", "--lock", "patches.lock", "--import", "mine")
    assert (code, text) == (1, "'late.two' is not in the lock; lock again with it\n")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 7}', "\xff"])
def test_what_is_no_lock_is_an_error_of_its_own(text: str, project: Path) -> None:
    (project / "patches.lock").write_bytes(text.encode("latin-1"))
    code, said = command(project, "check", "--lock", "patches.lock")
    assert code == 2
    assert said.startswith("patches: expected")


@pytest.mark.usefixtures("unchanged")
def test_without_ids_what_is_in_force_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tests.helpers.unimported", raising=False)
    with pytest.raises(patches.ManifestError, match="found none in force"):
        lock()
    patches.register(declare("lock-scale", f"{FUNCTIONS}:scale"))
    patches.register(declare("lock-late", "tests.helpers.unimported:answer"))
    with patches.transaction("fake.lock-scale", "fake.lock-late", reason="a test", deferred=True):
        found = lock()
    assert [entry["id"] for entry in found["patches"]] == ["fake.lock-late", "fake.lock-scale"]
    assert {entry["verdict"] for entry in found["patches"]} == {"needed"}
    assert changes(json.loads(json.dumps(found))) == []
    assert lock("fake.lock-scale", "fake.lock-late")["patches"][1]["fingerprint"] == found["patches"][1]["fingerprint"]


def test_a_lock_can_be_replayed() -> None:
    patches.register(declare("lock-replayed", f"{FUNCTIONS}:describe"))
    done = patches.replay(lock("fake.lock-replayed"))
    assert [receipt.id for receipt in done.receipts] == ["fake.lock-replayed"]
    moved: dict[str, Any] = {**lock("fake.lock-replayed")}
    patches.revert(*done.receipts)
    moved["patches"][0]["fingerprint"] = "0" * 16
    with pytest.raises(patches.ManifestError, match="had the fingerprint 0000"):
        patches.replay(moved)


def test_it_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, link = tmp_path / "real" / "a.lock", tmp_path / "b.lock"
    place.parent.mkdir()
    place.write_text("before")
    place.chmod(0o600)
    link.symlink_to(place)
    with pytest.raises(TypeError):
        write({"format": object()}, link)
    assert (place.read_text(), [file.name for file in place.parent.iterdir()]) == ("before", ["a.lock"])
    write({"format": 2, "patches": []}, link)
    assert link.is_symlink()
    assert read(place) == {"format": 2, "patches": []}
    assert place.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in place.parent.iterdir()] == ["a.lock"]
    with pytest.raises(patches.ManifestError, match="expected a place to write to"):
        write({}, tmp_path / "no" / "folder")
