"""`tools/upstream_sweep.py`: what it makes of verdicts, and what it says of versions and probes that disagree."""

from __future__ import annotations

from pathlib import Path

import pytest

from upstream.releases import InstallError, Release, environment, install
from upstream.report import contradictions, page
from upstream.verdicts import Outcome, check

INSTALLED = {"peft": "2.0", "bitsandbytes": "1.0"}
SEEN = "the probe sees the defect"
UNSEEN = "the probe does not see the defect"


def outcome(peft: str, verdict: str, why: str, *more: Release) -> Outcome:
    releases = (Release(name="peft", version=peft), Release(name="bitsandbytes", version="1.0"), *more)
    return Outcome(releases=releases, verdicts={"peft.x": {"verdict": verdict, "why": why}})


@pytest.mark.parametrize(
    ("verdict", "why", "expected"),
    [
        ("needed", f"{SEEN}; peft 1.0 is in >=1", []),
        ("obsolete", f"{UNSEEN}; peft 1.0 is not in >=2", []),
        ("unknown", "the probe raised OSError()", []),
        ("unknown", f"{SEEN}; peft 1.0 is not in >=2", ["the defect is there, outside the window"]),
        ("obsolete", UNSEEN, ["the defect is not there, inside the window"]),
    ],
)
def test_a_window_that_does_not_fit_the_defect_is_found(verdict: str, why: str, expected: list[str]) -> None:
    assert [what for _, what, _ in contradictions([outcome("1.0", verdict, why)])] == expected


def test_releases_that_agree_are_one_run_in_the_order_of_versions() -> None:
    needed, gone = ("needed", SEEN), ("obsolete", f"{UNSEEN}; peft 1 is not in <2")
    outcomes = [outcome("0.10", *needed), outcome("0.9", *needed), outcome("2.0", *gone), outcome("0.2", *gone)]
    assert "| `peft.x` | obsolete 0.2; needed 0.9 to 0.10; obsolete 2.0 |" in page(outcomes, INSTALLED)


def test_what_cannot_be_imported_is_no_verdict_of_ours() -> None:
    error = "ImportError: cannot import name 'HybridCache' from 'transformers' (/a/b.py)"
    why = f"importing 'peft.tuners' raised {error!r}"
    broken = Outcome(**{**vars(outcome("1.0", "incompatible", why)), "not_importable": {"peft": error}})
    old = outcome("1.0", "obsolete", f"{UNSEEN}; peft 1.0 is not in <1", Release(name="transformers", version="4"))
    text = page([broken, old], INSTALLED)
    assert "| `peft.x` | not importable 1.0 |" in text
    assert "| peft 1.0, bitsandbytes 1.0, transformers 4 | 0 | obsolete: `peft.x` |" in text
    assert "cannot import name 'HybridCache' from 'transformers'`" in text


def test_patches_are_asked_in_a_process_with_other_releases(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("print('hello')\nraise OSError('no such\\nlibrary')\n")
    ids = ["torch.fsdp1-sync-on-cpu"]
    found = check([Release(name="broken", version="1.0")], [tmp_path], ids)
    assert found.not_importable == {"broken": "OSError: no such"}
    assert list(found.verdicts) == ids
    assert found.verdicts[ids[0]]["verdict"] in ("needed", "unknown")
    assert "no patch has the id 'no.such'" in check([], [], ["no.such"]).failure


def test_a_release_is_installed_once(tmp_path: Path) -> None:
    there = tmp_path / "peft-1.0"
    there.mkdir()
    assert install(Release(name="peft", version="1.0"), tmp_path) == there
    assert environment([there, tmp_path])["PYTHONPATH"] == f"{there}:{tmp_path}"


def test_a_release_that_cannot_be_installed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InstallError, match=r"peft 0\.0 could not be installed"):
        install(Release(name="peft", version="0.0"), tmp_path)
    assert not (tmp_path / "peft-0.0").exists()
