"""`patches new`: what it writes passes its own tests, is found, and is never written over anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import patches
from patches.cli import app

ROOT = Path(__file__).parents[2]
TARGETS = {
    "json.a-function": "json:dumps",
    "json.a-method": "json.encoder:JSONEncoder.encode",
    "packaging.an-inherited-method": "packaging.version:Version.__lt__",
    "packaging.a-property": "packaging.version:Version.major",
    "fractions.a-classmethod": "fractions:Fraction.from_float",
    "string.a-static-method": "str_methods:Box.opened",
    "string.class": "math:floor",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "str_methods.py").write_text("class Box:\n    @staticmethod\n    def opened():\n        return 1\n")
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command makes the project importable
    return tmp_path


def new(project: Path, patch_id: str, target: str, *options: str) -> Result:
    arguments = ["new", "my_project.patches", "--id", patch_id, "--target", target, "--root", str(project), *options]
    return CliRunner().invoke(app, arguments)


def test_what_it_writes_passes_its_own_tests_and_is_formatted(project: Path) -> None:
    for patch_id, target in TARGETS.items():
        made = new(project, patch_id, target, "--reason", 'it says "no"\nand \\ stops')
        assert made.exit_code == 0, made.output
    environment = {**os.environ, "PYTHONPATH": f"{project}{os.pathsep}{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "patches.testing.plugin", "-W", "error", "tests"],
        cwd=project, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert f"{2 * len(TARGETS)} passed" in ran.stdout, ran.stdout
    for tool in (
        [
            "ruff",
            "check",
            "--isolated",
            "--select",
            "E,W,F,I,UP,B,RUF,PL,PT,RET,ANN001,ANN2",
            "--ignore",
            "E501",
            "my_project",
        ],
        ["ruff", "check", "--isolated", "tests"],
        ["ruff", "format", "--check", "--isolated", "my_project", "tests"],
        ["ruff", "format", "--check", "--isolated", "--line-length", "120", "my_project", "tests"],
        ["mypy", "--strict", "my_project", "tests"],
    ):
        given = {**os.environ, "MYPYPATH": str(ROOT)}
        command = [sys.executable, "-m", *tool]
        ran = subprocess.run(command, cwd=project, env=given, capture_output=True, text=True, timeout=120, check=False)
        assert ran.returncode == 0, ran.stdout


def test_it_says_what_to_add_and_to_run(project: Path) -> None:
    made = new(project, "json.strict", "json:dumps")
    assert '[project.entry-points."patches.registry"]\n"json.strict" = "my_project.patches.strict"' in made.output
    assert f"python -m pytest {project}/tests/test_strict.py" in made.output


def test_the_report_is_linked_if_there_is_one(project: Path) -> None:
    new(project, "json.strict", "json:dumps", "--upstream", "https://example.org/1")
    new(project, "json.loose", "json:dumps")
    strict, loose = ((project / "my_project" / "patches" / name).read_text() for name in ("strict.py", "loose.py"))
    assert 'upstream="https://example.org/1"' in strict
    assert "upstream" not in loose


def test_a_target_without_a_colon_is_told_as_such() -> None:
    program = "from patches.cli import main; main()"
    arguments = ["new", "mine", "--id", "textwrap.strict", "--target", "textwrap.shorten"]
    command = [sys.executable, "-c", program, *arguments]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert ran.stderr.startswith("patches: ")
    assert "textwrap.shorten" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_patch_is_tied_to_what_is_installed(project: Path) -> None:
    new(project, "packaging.strict", "packaging.version:parse")
    text = (project / "my_project" / "patches" / "strict.py").read_text()
    assert 'requires={"packaging": "==' in text
    assert 'fingerprint="' in text
    new(project, "math.rounded", "math:ceil", "--tests", "more")  # neither a distribution nor Python source
    assert (project / "more" / "test_rounded.py").exists()
    text = (project / "my_project" / "patches" / "rounded.py").read_text()
    assert "requires=" not in text
    assert "fingerprint=" not in text


def test_nothing_is_written_over_and_nothing_is_written_in_part(project: Path) -> None:
    kept = project / "tests" / "test_strict.py"
    kept.parent.mkdir()
    kept.write_text("mine")
    made = new(project, "json.strict", "json:dumps")
    assert isinstance(made.exception, patches.PatchError)
    assert str(kept) in str(made.exception)
    assert kept.read_text() == "mine"
    assert not (project / "my_project").exists()


@pytest.mark.parametrize(
    ("package", "patch_id", "target", "message"),
    [
        ("my-project", "json.strict", "json:dumps", "expected a package"),
        ("json.patches", "json.strict", "json:dumps", "which would hide that in"),
        ("patches", "json.strict", "json:dumps", "which would hide that in"),
        ("my_project", "Strict", "json:dumps", "not of the form 'upstream.kebab-name'"),
        ("my_project", "json.strict", "json.dumps", "not of the form"),
        ("my_project", "json.strict", "json:nothing", "has no attribute 'nothing'"),
        ("my_project", "json.strict", "math:pi", "math:pi"),
        ("my_project", "json.strict", "json:JSONEncoder", "json:JSONEncoder"),
    ],
)
def test_what_cannot_be_patched_is_refused(
    project: Path, package: str, patch_id: str, target: str, message: str
) -> None:
    arguments = ["new", package, "--id", patch_id, "--target", target, "--root", str(project)]
    made = CliRunner().invoke(app, arguments)
    assert isinstance(made.exception, patches.PatchError)
    assert message in str(made.exception)
    assert [path.name for path in project.iterdir()] == ["str_methods.py"]
