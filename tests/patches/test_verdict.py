from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import patches
from tests.helpers.declare import FUNCTIONS, declare
from tests.helpers.fake_upstream import layers

SCALE = f"{FUNCTIONS}:scale"
INSIDE = {"wrapt": ">=1", "packaging": ">=1"}
OUTSIDE = {"wrapt": ">=1", "packaging": "<1"}

pytestmark = pytest.mark.usefixtures("unchanged")


def failing() -> bool:
    raise RuntimeError("no such symbol")


@pytest.mark.parametrize(
    ("probe", "requires", "kind", "why"),
    [
        (None, {}, "needed", "no particular version"),
        (None, INSIDE, "needed", "packaging .* is in >=1"),
        (None, OUTSIDE, "unknown", "packaging .* is not in <1"),
        (lambda: True, INSIDE, "needed", "sees the defect"),
        (lambda: True, OUTSIDE, "unknown", "sees the defect; packaging .* is not in <1"),
        (lambda: False, INSIDE, "obsolete", "does not see the defect"),
        (lambda: False, OUTSIDE, "obsolete", "does not see the defect; packaging .* is not in <1"),
        (failing, INSIDE, "unknown", "no such symbol"),
        (
            lambda: True,
            {"no-such-distribution": ">=1"},
            "absent",
            "not installed: no-such-distribution",
        ),
    ],
)
def test_verdicts(probe: Callable[[], bool] | None, requires: dict[str, str], kind: str, why: str) -> None:
    found = patches.verdict(declare("a", SCALE, probe=probe, requires=requires))
    assert str(found) == found.kind == kind
    assert re.search(why, found.why)


def test_a_target_that_is_gone_is_incompatible() -> None:
    found = patches.verdict(declare("a", f"{FUNCTIONS}:gone"))
    assert found.kind == "incompatible"
    assert "no attribute 'gone'" in found.why


def test_a_library_that_is_not_installed_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    for target in ("no_such_library:function", "no_such_library.part:Class.method"):
        found = patches.verdict(declare("a", target))
        assert (found.kind, found.why) == ("absent", "not installed: module no_such_library")
    for target in ("half_installed:function", "half_installed.part:function", "json.no_such_part:function"):
        assert patches.verdict(declare("a", target)).kind == "incompatible"


def test_prereleases_and_local_versions_are_in_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patches.versions.installed_version", {"a": "2.1.0.dev3", "b": "2.13.0+cpu"}.get)
    patch = declare("a", SCALE, requires={"a": ">=2,<3", "b": "<=2.13.0"})
    assert patches.verdict(patch).kind == "needed"


def test_a_probe_runs_once_and_not_while_its_patch_is_active() -> None:
    seen: list[int] = []
    patch = declare("a", SCALE, probe=lambda: seen.append(len(patches.active())) is None)
    with patches.transaction(patch, reason="a test"), patches.transaction(patch, reason="a test"):
        assert patches.verdict(patch).kind == "needed"
    assert seen == [0]


def test_an_obsolete_patch_is_skipped_and_the_ledger_says_so() -> None:
    patch = declare("a", SCALE, probe=lambda: False)
    with patches.transaction(patch, reason="a test") as tx:
        assert tx.receipts == []
        assert [receipt.id for receipt in tx.skipped] == ["fake.a"]
        assert tx.verdicts["fake.a"].kind == "obsolete"
        assert patches.active() == []
    entry = patches.LEDGER.entries[-1]
    assert (entry.id, entry.state) == ("fake.a", "skipped")
    assert "does not see the defect" in entry.note


def test_an_obsolete_patch_of_code_that_is_gone_is_skipped_in_any_scope() -> None:
    layer = layers.Base()
    patch = declare("a", f"{FUNCTIONS}:gone", requires=OUTSIDE)
    with patches.transaction(patch, on=[layer], reason="a test") as tx:
        assert [(receipt.id, receipt.scope_text) for receipt in tx.skipped] == [("fake.a", "1 instance")]


def test_force_applies_an_obsolete_patch() -> None:
    with patches.transaction(declare("a", SCALE, probe=lambda: False), reason="a test", force=True) as tx:
        assert [receipt.id for receipt in tx.receipts] == ["fake.a"]


def test_an_unknown_patch_is_applied_and_flagged() -> None:
    patch = declare("a", SCALE, requires=OUTSIDE)
    with pytest.warns(patches.VersionWarning, match="not in <1"), patches.transaction(patch, reason="a test"):
        assert [(row.state, row.verdict) for row in patches.audit()] == [("active", "unknown")]


def test_a_probe_that_raises_stops_the_transaction_unless_forced() -> None:
    patch = declare("a", SCALE, probe=failing)
    with (
        pytest.raises(patches.ProbeError, match="force=True") as caught,
        patches.transaction(patch, reason="a test"),
    ):
        pass
    assert isinstance(caught.value.__cause__, RuntimeError)
    with patches.transaction(patch, reason="a test", force=True) as tx:
        assert len(tx.receipts) == 1


@pytest.mark.parametrize(
    ("patch", "why"),
    [
        (declare("a", SCALE, requires={"no-such-distribution": ""}), "not installed: no-such-distribution"),
        (declare("a", f"{FUNCTIONS}:gone"), "no attribute 'gone'"),
    ],
)
def test_an_absent_or_incompatible_patch_stops_the_transaction_even_if_forced(patch: patches.Patch, why: str) -> None:
    with (
        pytest.raises(patches.IncompatibleError, match=why) as caught,
        patches.transaction(patch, reason="x", force=True),
    ):
        pass
    assert caught.value.patch_id == "fake.a"
