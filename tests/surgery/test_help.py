"""Help and version of every command, in 80 columns by whole names; and who speaks on which rank."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import patches.cli
import surgery.cli

APPS = {"surgery": surgery.cli.app, "patches": patches.cli.app}
COMMANDS = [(name, command) for name, app in APPS.items() for command in get_command(app).commands]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", APPS)
def test_version_and_short_help(name: str) -> None:
    distribution = {"surgery": "model-surgery", "patches": "model-surgery-patches"}[name]
    assert CliRunner().invoke(APPS[name], ["--version"]).stdout == f"{name} {version(distribution)}\n"
    short, long = (CliRunner().invoke(APPS[name], [option]).stdout for option in ("-h", "--help"))
    assert short == long
    assert all(command in long for of, command in COMMANDS if of == name)


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_help_has_whole_names_in_80_columns(name: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(APPS[name], [command, "-h"])
    assert result.exit_code == 0, result.output
    assert result.stdout == CliRunner().invoke(APPS[name], [command, "--help"]).stdout
    words = result.stdout.replace(",", " ").split()
    found = get_command(APPS[name]).commands[command].params  # type: ignore[attr-defined]
    options = [option for parameter in found for option in (*parameter.opts, *parameter.secondary_opts)]
    assert [option for option in options if option.startswith("-") and option not in words] == []
    assert [line for line in result.stdout.splitlines() if len(line) > 80 or "…" in line] == []
    assert [parameter.name for parameter in found if not parameter.help] == []


SPEAK = """
import logging, os, surgery.cli, warnings
surgery.cli._quiet_libraries()
for category in (FutureWarning, UserWarning):
    for module in ("peft.tuners.lora", "transformers", "mine", "trl_of_mine"):
        warnings.warn_explicit(f"{category.__name__} of {module}", category, "file", 1, module=module)
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("no kernels")
import transformers
transformers.utils.logging.get_logger("transformers.models").warning("a remark")
"""


def test_libraries_speak_on_rank_0_alone_and_the_users_own_code_everywhere() -> None:
    of_ours = {f"{kind}Warning of {module}" for kind in ("Future", "User") for module in ("mine", "trl_of_mine")}
    of_libraries = {"UserWarning of peft.tuners.lora", "UserWarning of transformers", "a remark"}
    for rank, expected in (("0", of_ours | of_libraries), ("1", of_ours)):
        environment = {**os.environ, "RANK": rank, "PYTHONWARNINGS": ""}
        said = subprocess.run(
            [sys.executable, "-c", SPEAK], env=environment, capture_output=True, text=True, check=True
        ).stderr
        found = {line.rpartition(": ")[2].removeprefix("[transformers] ") for line in said.splitlines() if line.strip()}
        assert found == expected, said
