"""`tools/torch_sweep.py`: the rows of releases of torch, and that the other sweep keeps them."""

from __future__ import annotations

from pathlib import Path

import pytest

import torch_sweep
from upstream.torch_rows import row, rows_of, with_rows
from upstream.verdicts import Outcome

PAGE = "# Compatibility\n\n| patch | verdicts |\n| --- | --- |\n| `a.b` | needed 0.6 |\n\n## Last\n\nNothing.\n"
VERDICTS = {"a.needed": "needed", "b.gone": "obsolete", "c.gone": "obsolete", "d.unsure": "unknown"}


def outcome() -> Outcome:
    return Outcome(releases=(), verdicts={key: {"verdict": word, "why": ""} for key, word in VERDICTS.items()})


def test_a_row_says_what_was_found() -> None:
    tests = {"t::one": "passed", "t::two": "failed", "t::three": "passed", "t::four": "skipped"}
    assert row("2.14.1", {"peft": "0.21.2"}, outcome(), tests) == (
        "| 2.14.1 | peft 0.21.2 | 1 | obsolete: `b.gone`, `c.gone`; unknown: `d.unsure` "
        "| 2 passed, 1 failed, 1 skipped: `two` |"
    )


def test_rows_are_added_replaced_and_kept_in_order() -> None:
    lines = {version: row(version, {}, outcome(), {"t": "passed"}) for version in ("2.9.0", "2.13.0", "2.11.0")}
    first = with_rows(PAGE, {"2.13.0": lines["2.13.0"]})
    page = with_rows(first, {**rows_of(first), **lines})
    assert page.startswith(PAGE.rstrip())
    assert list(rows_of(page)) == ["2.9.0", "2.11.0", "2.13.0"]
    assert rows_of(page) == lines
    assert with_rows(page, rows_of(page)) == page
    assert with_rows(PAGE, rows_of(page)) == page, "another sweep, which writes the rest anew, keeps them"
    assert with_rows(PAGE, {}) == PAGE


def test_a_section_in_the_middle_stays_there() -> None:
    page = with_rows("# Title\n", {"2.13.0": row("2.13.0", {}, outcome(), {})}) + "\n## Last\n\nNothing.\n"
    again = with_rows(page, rows_of(page))
    assert again == page


def test_an_environment_is_asked_and_its_row_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By this very interpreter, with one quick file of tests."""
    written = tmp_path / "page.md"
    written.write_text(PAGE)
    monkeypatch.setattr(torch_sweep, "_PAGE", written)
    monkeypatch.setattr(torch_sweep, "_FOLDER", tmp_path)
    monkeypatch.setattr(torch_sweep, "BUILTIN", ["bitsandbytes.cpu-dequantize-flat"])
    monkeypatch.setattr(
        "sys.argv", ["torch_sweep", "--python", torch_sweep.sys.executable, "--tests", "tests/tools/test_make_data.py"]
    )
    assert torch_sweep.main() == 0
    (line,) = rows_of(written.read_text()).values()
    assert "bitsandbytes 0." in line
    assert " passed |" in line
