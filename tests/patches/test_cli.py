from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner, Result

import patches
from patches.builtin import BUILTIN
from patches.cli import app
from tests.helpers.declare import FUNCTIONS, declare


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    scale = f"{FUNCTIONS}:scale"
    patches.register(declare("cli-needed", scale, upstream="https://example.org/1", requires={"wrapt": ">=1"}))
    patches.register(declare("cli-obsolete", scale, probe=lambda: False))
    patches.register(declare("cli-unknown", scale, requires={"wrapt": "<1"}))
    patches.register(declare("cli-incompatible", f"{FUNCTIONS}:gone"))
    patches.register(declare("cli-gone", f"{FUNCTIONS}:gone", requires={"wrapt": "<1"}))
    patches.register(declare("cli-absent", "no_such_library:function"))


def test_list_shows_every_id_without_importing_any() -> None:
    program = "import sys; from patches.cli import app; app(['list', '--json'], standalone_mode=False); "
    program += "assert not {'torch', 'bitsandbytes', 'peft'} & sys.modules.keys()"
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert set(BUILTIN) <= {row["id"] for row in json.loads(ran.stdout)}


def test_list_is_a_table() -> None:
    lines = run("list").stdout.splitlines()
    assert lines[0].split() == ["id", "source"]
    assert any(line.split() == ["fake.cli-needed", "tests.helpers.declare"] for line in lines)
    assert "qlora-build" in lines[-1].removeprefix("bundles: ").split(", ")


def test_show_has_every_fact() -> None:
    shown = json.loads(run("show", "fake.cli-needed", "--json").stdout)
    assert shown["target"] == f"{FUNCTIONS}:scale"
    assert shown["requires"] == {"wrapt": ">=1"}
    assert shown["verdict"] == "needed"
    table = run("show", "fake.cli-needed").stdout
    assert "https://example.org/1" in table
    assert "wrapt >=1" in table


def test_show_says_what_replaces_the_target() -> None:
    targets = (f"{FUNCTIONS}:gone", f"{FUNCTIONS}:scale")
    patches.register(declare("cli-replaced", targets, wrapper=None, replace=_scale))
    shown = json.loads(run("show", "fake.cli-replaced", "--json").stdout)
    assert shown["target"] == " or ".join(targets)
    assert shown["replace"] == f"{__name__}:_scale"
    patches.register(declare("cli-set", f"{FUNCTIONS}:scale", wrapper=None, kind="value", replace={1, 2}))
    assert json.loads(run("show", "fake.cli-set", "--json").stdout)["replace"] == "{1, 2}"
    assert "{1, 2}" in run("show", "fake.cli-set").stdout


def _scale(x: int, *, by: int = 2) -> int:
    return x * by


@pytest.mark.parametrize(
    ("patch_id", "verdict", "code"),
    [
        ("fake.cli-needed", "needed", 0),
        ("fake.cli-obsolete", "obsolete", 0),
        ("fake.cli-gone", "obsolete", 0),
        ("fake.cli-absent", "absent", 0),
        ("fake.cli-unknown", "unknown", 1),
        ("fake.cli-incompatible", "incompatible", 1),
    ],
)
def test_check_exits_with_1_for_what_cannot_be_trusted(patch_id: str, verdict: str, code: int) -> None:
    ran = run("check", patch_id, "--json")
    assert [(row["id"], row["verdict"]) for row in json.loads(ran.stdout)] == [(patch_id, verdict)]
    assert ran.exit_code == code
    assert run("check", "fake.cli-needed", patch_id).exit_code == code


@pytest.fixture
def patching_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "patching_module.py").write_text(
        "import patches\n"
        "from tests.helpers.declare import FUNCTIONS, declare\n"
        "with patches.transaction(declare('cli', f'{FUNCTIONS}:scale'), reason='on import') as tx:\n"
        "    tx.commit()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "patching_module"
    patches.revert(*patches.active())


def test_audit_shows_what_an_imported_module_patches(patching_module: str) -> None:
    assert run("audit").stdout == "no patch is active\n"
    rows = json.loads(run("audit", "--import", patching_module, "--json").stdout)
    assert [(row["id"], row["reason"]) for row in rows] == [("fake.cli", "on import")]
    assert "patching_module.py:3" in run("audit").stdout


def test_audit_all_shows_history() -> None:
    with patches.transaction(declare("past", f"{FUNCTIONS}:scale"), reason="a test"):
        pass
    assert "fake.past" in run("audit", "--all").stdout
    assert "fake.past" not in run("audit").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "fake.cli-neded"), "did you mean fake.cli-needed"),
        (("check", "nobody.knows"), "no patch has the id 'nobody.knows'"),
        (("check", "nobody.knows"), "name the module that registers it with --import MODULE"),
        (("check", "nobodys-bundle"), "If it is yours, name the module that registers it with --import MODULE"),
        (("aliases", "json.dumps"), "a target has a colon, such as json:dumps"),
        (("audit", "--import", "no_such_module"), "cannot be imported"),
        (("show",), "Missing argument"),
    ],
)
def test_a_wrong_argument_exits_with_2_and_says_why(arguments: tuple[str, ...], message: str) -> None:
    program = (
        "import patches\nfrom tests.helpers.declare import FUNCTIONS, declare\n"
        "patches.register(declare('cli-needed', f'{FUNCTIONS}:scale'))\n"
        "from patches.cli import main; main()\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert message in " ".join(ran.stderr.split())
    assert "Traceback" not in ran.stderr


COMMANDS = {
    "list": (),
    "lock": ("mine.scale",),
    "show": ("mine.scale",),
    "check": ("mine.scale",),
    "audit": (),
    "aliases": ("mine.scale",),
    "plan": ("mine.scale",),
    "new": ("mine.more", "--id", "mine.again", "--target", "mine.library:scale"),
}


def test_the_table_of_commands_is_complete() -> None:
    others = {"run"}  # whose --import is for the processes that it starts
    assert {*COMMANDS, *others} == set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("command", ["", "run", *COMMANDS])
def test_help_fits_a_terminal_of_80_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = run(*command.split(), "--help")
    assert ran.exit_code == 0
    assert len(ran.stdout) > 200
    assert "…" not in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) <= 80
    options = typer.main.get_command(app).commands[command].params if command else ()
    names = [name for option in options for name in option.opts if name.startswith("--")]
    assert [name for name in names if f" {name} " not in ran.stdout] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_imports_from_the_current_folder(command: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    (tmp_path / "mine" / "library.py").write_text("def scale(x):\n    return x\n")
    (tmp_path / "mine" / "patch.py").write_text(
        "import patches\n\n"
        "@patches.register('mine.scale', target='mine.library:scale', reason='a test')\n"
        "def scale(wrapped, instance, args, kwargs):\n    return wrapped(*args, **kwargs)\n\n"
        "print('registered')\n"
    )
    program = "import sys; sys.path.remove(''); from patches.cli import main; main()"  # as the console script does
    arguments = [sys.executable, "-c", program, command, "--import", "mine.patch", *COMMANDS[command]]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(
        arguments, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("registered\n")


@pytest.mark.parametrize(("columns", "header"), [(40, ["id", "verdict"]), (60, ["id", "verdict", "why"])])
def test_a_table_that_is_too_wide_for_the_terminal_has_its_last_column_wrapped(
    columns: int, header: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = run("check", "fake.cli-needed", "fake.cli-obsolete").stdout
    assert len(wide.splitlines()) == 3
    monkeypatch.setenv("COLUMNS", str(columns))
    narrow = run("check", "fake.cli-needed", "fake.cli-obsolete").stdout
    assert max(map(len, narrow.splitlines())) <= columns
    assert narrow.splitlines()[0].split() == header
    assert sorted(narrow.split()) == sorted(wide.split())


@pytest.mark.parametrize(("name", "told"), [("scale", "traced"), ("floor", "not seen")])
def test_what_torch_compile_makes_of_a_patch_is_told(name: str, told: str) -> None:
    patch_id = f"fake.cli-compiled-{name}"
    patches.register(declare(f"cli-compiled-{name}", f"{FUNCTIONS}:{name}"))
    assert told in json.loads(run("show", patch_id, "--json").stdout)["torch.compile"]
    (row,) = json.loads(run("check", patch_id, "--json").stdout)
    assert told in row["torch.compile"]
