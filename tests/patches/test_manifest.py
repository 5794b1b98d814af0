from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import patches
from patches.versions import installed_version
from tests.helpers import replayed
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import functions, layers


@pytest.fixture(autouse=True)
def nothing_left(unchanged: object) -> Iterator[None]:
    yield
    patches.revert(*patches.active())


def apply(*items: Any, **options: Any) -> None:
    with patches.transaction(*items, reason="a test", **options) as tx:
        tx.commit()


def undone(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest, as another process sees it: nothing is applied, and it has been through JSON."""
    patches.revert(*patches.active())
    return json.loads(json.dumps(manifest))


def test_a_replayed_manifest_is_the_same_again() -> None:
    apply("fake.replayed-scale", count_calls=True)
    apply("fake.replayed-forward")
    digest, manifest = patches.digest(), patches.manifest()
    assert [entry["id"] for entry in manifest["patches"]] == ["fake.replayed-scale", "fake.replayed-forward"]
    manifest = undone(manifest)
    assert functions.scale(2) == 4
    done = patches.replay(manifest)
    assert functions.scale(2) == ("replayed-scale", 4)
    assert [receipt.id for receipt in patches.active()] == ["fake.replayed-scale", "fake.replayed-forward"]
    assert patches.digest() == digest
    assert done.receipts[0].calls == 1
    assert done.reason == "replayed: a test"
    assert done.by.startswith(__file__)


def test_replaying_twice_changes_nothing() -> None:
    apply("fake.replayed-scale")
    manifest = patches.manifest()
    assert patches.replay(manifest).receipts == []
    assert functions.scale(2) == ("replayed-scale", 4)
    assert len(patches.active()) == 1


def test_what_waits_is_in_the_manifest_and_waits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tests.helpers.unimported", raising=False)
    patches.register(declare("replayed-late", "tests.helpers.unimported:answer"))
    patches.defer("fake.replayed-late", reason="a test")
    manifest = patches.manifest()
    assert [(entry["id"], entry["options"]["deferred"]) for entry in manifest["patches"]] == [
        ("fake.replayed-late", True)
    ]
    patches.revert("fake.replayed-late")
    done = patches.replay(json.loads(json.dumps(manifest)))
    assert "tests.helpers.unimported" not in sys.modules
    assert [receipt.state for receipt in done.deferred] == ["pending"]
    assert patches.replay(manifest).deferred == []  # it waits already
    patches.revert("fake.replayed-late")


def test_options_are_kept() -> None:
    apply("fake.replayed-obsolete", force=True)
    apply("fake.replayed-scale")
    patches.disable("fake.replayed-scale")
    patches.replay(undone(patches.manifest()))
    assert {receipt.id: receipt.disabled for receipt in patches.active()} == {
        "fake.replayed-obsolete": False,
        "fake.replayed-scale": True,
    }
    assert functions.scale(2) == 4


def test_what_cannot_be_replayed_is_listed_with_the_grounds() -> None:
    instance = layers.Base()
    apply("fake.replayed-forward", on=[instance])
    apply(declare("unregistered", f"{FUNCTIONS}:scale"))
    manifest = patches.manifest()
    assert manifest["patches"] == []
    assert [(entry["id"], entry["why"]) for entry in manifest["not_replayable"]] == [
        ("fake.replayed-forward", "it is limited to 1 instance of this process"),
        ("fake.unregistered", "it is not registered, so its id leads nowhere"),
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"versions": {"wrapt": "0.1"}}, f"wrapt was 0.1, and here it is {installed_version('wrapt')}"),
        ({"target": f"{LAYERS}:Base.build"}, "had the target"),
        ({"verdict": "unknown"}, "was unknown, and here it is needed"),
    ],
)
def test_drift_is_refused_before_anything_is_applied(change: dict[str, Any], says: str) -> None:
    apply("fake.replayed-scale", "fake.replayed-forward")
    manifest = undone(patches.manifest())
    entry = next(entry for entry in manifest["patches"] if entry["id"] == "fake.replayed-forward")
    entry.update({key: {**entry[key], **new} if isinstance(new, dict) else new for key, new in change.items()})
    with pytest.raises(patches.ManifestError, match="nothing was applied") as raised:
        patches.replay(manifest)
    assert len(raised.value.differences) == 1
    assert says in raised.value.differences[0]
    assert patches.active() == []


@pytest.mark.parametrize(
    ("module", "says"),
    [("__main__", "declare it in a module"), ("no.such.module", "No module named"), ("json", "no patch has the id")],
)
def test_a_patch_that_cannot_be_found_is_refused(module: str, says: str) -> None:
    apply("fake.replayed-scale")
    manifest = undone(patches.manifest())
    manifest["patches"][0].update(id="fake.nowhere", module=module)
    with pytest.raises(patches.ManifestError, match=says):
        patches.replay(manifest)


@pytest.mark.parametrize(
    "text",
    [
        '{"format": 1}',
        '{"format": 2}',
        "{",
        "[1]",
        '{"format": 2, "patches": [{}]}',
        '{"format": 2, "patches": [1]}',
        "/no/such/file",
    ],
)
def test_what_is_no_manifest_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHES_MANIFEST", text)
    with pytest.raises(patches.ManifestError):
        patches.replay_from_environment()


def test_without_the_variable_nothing_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATCHES_MANIFEST", raising=False)
    assert patches.replay_from_environment() is None


@pytest.mark.parametrize("in_a_file", [False, True])
def test_a_spawned_process_has_the_same_patches(
    in_a_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply("fake.replayed-scale", "fake.replayed-forward")
    text = json.dumps(patches.manifest())
    (tmp_path / "manifest.json").write_text(text)
    monkeypatch.setenv("PATCHES_MANIFEST", str(tmp_path / "manifest.json") if in_a_file else text)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        before, after, digest = pool.apply(replayed.report)
    assert before == 4
    assert after == ("replayed-scale", 4)
    assert digest == patches.digest()


def test_a_new_interpreter_that_knows_no_id_imports_what_declares_it() -> None:
    apply("fake.replayed-scale")
    program = (
        "import json, sys, patches\n"
        "tx = patches.replay(json.load(sys.stdin))\n"
        f"from {FUNCTIONS} import scale\n"
        "print(scale(2), patches.digest())\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(patches.manifest()),
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout.split() == ["('replayed-scale',", "4)", patches.digest()]


def test_the_digest_is_of_the_active_set() -> None:
    empty = patches.digest()
    apply("fake.replayed-scale")
    one = patches.digest()
    apply("fake.replayed-forward")
    both = patches.digest()
    patches.revert("fake.replayed-scale")
    apply("fake.replayed-scale")
    assert patches.digest() == both
    patches.disable("fake.replayed-forward")
    assert patches.digest() == one
    patches.revert(*patches.active())
    apply("fake.replayed-forward", on=[instance := layers.Base()])
    assert patches.digest() == empty
    assert len({empty, one, both}) == 3
    assert instance.forward(1) == ("replayed-forward", ("Base", 1))
