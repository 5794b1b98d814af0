"""The command line: messages and exit codes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import typer

from patches.errors import PatchError
from surgery.cli import reports_errors
from surgery.errors import ConfigError, SurgeryError


def raised(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error from OSError("the disk is full")

    return reports_errors(command)


@pytest.mark.parametrize("error", [ConfigError("no"), SurgeryError("no"), PatchError("no")])
def test_expected_errors_are_messages(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught:
        raised(error)()
    assert caught.value.exit_code == 2
    assert capsys.readouterr().err == "error: no\n  because: OSError: the disk is full\n"


def test_cause_that_the_message_already_tells_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        raised(ConfigError("cannot write: the disk is full"))()
    assert capsys.readouterr().err == "error: cannot write: the disk is full\n"


def test_other_ranks_say_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(typer.Exit):
        raised(ConfigError("no\nlonger"))()
    assert capsys.readouterr().err == "rank 3: error: no\n"


def test_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught:
        raised(KeyboardInterrupt())()
    assert caught.value.exit_code == 130
    assert "interrupted" in capsys.readouterr().err


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        raised(ZeroDivisionError())()
