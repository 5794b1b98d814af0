"""The registry without torch, and without the rest of this project."""

from __future__ import annotations

import json
import subprocess
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from patches.builtin import BUILTIN
from tests.helpers.installed import Environment, build_wheel
from tests.packaging.conftest import ROOT

pytestmark = pytest.mark.network


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "patches"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    ).stdout.split()  # fmt: skip
    wanted = {name for name in tracked if (ROOT / name).exists() and name.endswith((".py", "py.typed", ".txt"))}
    with zipfile.ZipFile(wheel) as opened:
        found = {name for name in opened.namelist() if ".dist-info/" not in name}
    assert found == wanted | {"model_surgery_patches.py", "model_surgery_patches.pth"}


def test_what_an_earlier_build_has_left_is_not_in_the_wheel(tmp_path: Path) -> None:
    left = tmp_path / "build" / "patches" / "lib" / "patches" / "deleted.py"
    left.parent.mkdir(parents=True)
    left.touch()
    with zipfile.ZipFile(build_wheel(ROOT / "patches", tmp_path)) as opened:
        assert "patches/deleted.py" not in opened.namelist()


def test_it_requires_wrapt_and_packaging_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        declared = message_from_bytes(opened.read(name)).get_all("Requires-Dist") or []
        assert any(name.endswith("/LICENSE") for name in opened.namelist())
    assert sorted(each for each in declared if "extra ==" not in each) == ["packaging>=22", "wrapt>=2"]


def test_it_patches_without_torch(alone: Environment, tmp_path: Path) -> None:
    program = """
import importlib.util, textwrap
import patches
assert [name for name in ("torch", "surgery", "numpy") if importlib.util.find_spec(name)] == []
@patches.register("stdlib.loud", target="textwrap:shorten", reason="a test")
def loud(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs).upper()
with patches.transaction("stdlib.loud", reason="a test"):
    print(textwrap.shorten("all  is well", 40))
assert patches.active() == []
"""
    assert alone.run("python", "-W", "error", "-c", program, cwd=tmp_path) == "ALL IS WELL\n"


PATCHED_FROM_OUTSIDE = """
import patches
@patches.register("stdlib.loud", target="colorsys:rgb_to_hsv", reason="a test")
def loud(wrapped, instance, args, kwargs):
    return "loud"
"""


@pytest.mark.parametrize("from_outside", ["run", "variable", "isolated"])
def test_it_patches_from_outside(from_outside: str, alone: Environment, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PATCHED_FROM_OUTSIDE)
    child = "[sys.executable, '-c', 'from colorsys import rgb_to_hsv; print(rgb_to_hsv(1, 1, 1))']"
    (tmp_path / "script.py").write_text(
        "import subprocess, sys\nfrom colorsys import rgb_to_hsv\n"
        f"print(rgb_to_hsv(1, 1, 1), flush=True)\nsubprocess.run({child}, check=True)\n"
    )
    variables = {"PATCHES_APPLY": "stdlib.loud", "PATCHES_IMPORT": "mine"}
    command = {
        "run": ("patches", "run", "--apply", "stdlib.loud", "--import", "mine", "--", "script.py"),
        "variable": ("python", "script.py"),
        "isolated": ("python", "-I", "script.py"),  # no PYTHONPATH, and so no sitecustomize of ours
    }[from_outside]
    given = {} if from_outside == "run" else variables
    assert alone.run(*command, cwd=tmp_path, **given) == "loud\nloud\n"
    said = alone.run("python", "-c", "1", cwd=tmp_path, code=2, **{**variables, "PATCHES_APPLY": "stdlib.loudd"})
    assert "did you mean stdlib.loud?" in said


def test_builtin_patches_of_what_is_not_installed_are_absent_and_nothing_to_fail_for(
    alone: Environment, tmp_path: Path
) -> None:
    rows = json.loads(alone.run("patches", "check", "--json", cwd=tmp_path))
    assert {row["id"]: row["verdict"] for row in rows} == dict.fromkeys(BUILTIN, "absent")
    listed = json.loads(alone.run("python", "-m", "patches", "list", "--json", cwd=tmp_path))
    assert {row["id"] for row in listed} == set(BUILTIN)
    shown = alone.run("patches", "show", "torch.fsdp1-raw-reads", cwd=tmp_path)
    assert "absent" in shown
    assert "not installed: torch" in shown
    refused = alone.run("patches", "plan", "torch.fsdp1-raw-reads", cwd=tmp_path, code=2)
    target = "torch.distributed.fsdp._flat_param:FlatParamHandle._writeback_orig_params"
    why = f"not installed: torch, for '{target}'"
    assert refused == f"patches: 'torch.fsdp1-raw-reads' cannot be applied: {why}\n"


def test_without_the_extra_the_command_line_says_what_to_install(
    wheel: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bare = Environment.create(tmp_path_factory.mktemp("bare"), str(wheel))
    for command in (("patches", "list"), ("python", "-m", "patches", "list")):
        said = bare.run(*command, cwd=tmp_path, code=1)
        assert said.count("\n") == 1
        assert "needs typer" in said
        assert "pip install 'model-surgery-patches[cli]'" in said
    assert bare.run("python", "-c", "import patches; print(len(patches.ids()))", cwd=tmp_path) == f"{len(BUILTIN)}\n"


def test_the_pytest_plugin_is_active(alone: Environment, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("""
import textwrap
import patches

def loud(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs).upper()

LOUD = patches.Patch(id="stdlib.loud", target="textwrap:shorten", wrapper=loud, reason="a test")

def test_under_a_patch(patched):
    patched(LOUD)
    assert textwrap.shorten("a  b", 40) == "A B"

def test_that_leaks():
    patches.transaction(LOUD, reason="a test").__enter__().commit()
""")
    for command in (("pytest",), ("python", "-m", "pytest")):
        said = alone.run(*command, "-W", "error", cwd=tmp_path, code=1)
        assert "2 passed, 1 error" in said
        assert "stdlib.loud" in said


@pytest.mark.parametrize("shadow", ["patches.py", "patches/__init__.py"])
def test_a_file_called_patches_in_the_folder_stops_nothing(alone: Environment, tmp_path: Path, shadow: str) -> None:
    file = tmp_path / shadow
    file.parent.mkdir(exist_ok=True)
    file.write_text("MINE = True\n")
    (tmp_path / "test_mine.py").write_text("import patches\ndef test_mine(patched):\n    assert patches.MINE\n")
    for command in (("patches",), ("python", "-m", "model_surgery_patches"), ("python", "-P", "-m", "patches")):
        assert "torch.fsdp1-raw-reads" in alone.run(*command, "list", cwd=tmp_path)
    for command in (("pytest",), ("python", "-m", "pytest")):
        assert "1 passed" in alone.run(*command, "-W", "error", cwd=tmp_path)
