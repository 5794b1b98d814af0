"""Another distribution, built and installed, whose patches are found through the entry point."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "helpers" / "extension"
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def install(folder: Path, name: str = "acme-patches", version: str = "1.2") -> Path:
    """Build the extension, under this name and version, into a wheel, and install that; returns where it is."""
    source, wheels, site = (folder / part for part in ("source", "wheels", "site"))
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
    project = source / "pyproject.toml"
    text = (
        project.read_text().replace('"acme-patches"', f'"{name}"').replace('version = "1.2"', f'version = "{version}"')
    )
    project.write_text(text)
    offline = ["--no-index", "--no-deps"]
    subprocess.run([*PIP, "wheel", *offline, "--no-build-isolation", "--wheel-dir", wheels, source], check=True)
    (wheel,) = wheels.iterdir()
    subprocess.run([*PIP, "install", *offline, "--target", site, wheel], check=True)
    return site


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("acme"))


@pytest.fixture(scope="module")
def rival(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("rival"), "rival-patches", "3.0")


def run(tmp_path: Path, *command: str, sites: tuple[Path, ...]) -> str:
    path = os.pathsep.join(map(str, (*sites, ROOT)))
    ran = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_its_patches_are_listed_with_their_owner(acme: Path, tmp_path: Path) -> None:
    rows = json.loads(run(tmp_path, "-m", "patches", "list", "--json", sites=(acme,)))
    listed = {row["id"]: row["source"] for row in rows}
    assert listed["acme.loud-join"] == "acme-patches 1.2 (acme_patches.loud_join)"
    assert listed["acme.deep-indent"] == "acme-patches 1.2 (acme_patches.deep_indent:PATCH)"


def test_nothing_of_it_is_imported_until_it_is_asked_for(acme: Path, tmp_path: Path) -> None:
    program = """
import sys
import patches
assert {"acme.loud-join", "acme.deep-indent"} <= set(patches.ids())
assert not {"acme_patches", "torch"} & sys.modules.keys()
patches.get("acme.loud-join")
assert "acme_patches.loud_join" in sys.modules
assert not {"acme_patches.deep_indent", "torch"} & sys.modules.keys()
"""
    run(tmp_path, "-c", program, sites=(acme,))


def test_its_patches_are_applied_audited_and_undone(acme: Path, tmp_path: Path) -> None:
    program = """
import shlex, textwrap
import patches
stock = vars(shlex)["join"], vars(textwrap)["indent"]
with patches.transaction("acme.loud-join", "acme.deep-indent", reason="a test"):
    assert shlex.join(["a", "b c"]) == "A 'B C'"
    assert textwrap.indent("x", " ") == "  x"
    print(patches.audit().to_json())
assert (vars(shlex)["join"], vars(textwrap)["indent"]) == stock
assert not patches.active()
"""
    rows = json.loads(run(tmp_path, "-c", program, sites=(acme,)))
    assert {(row["id"], row["owner"], row["state"]) for row in rows} == {
        ("acme.loud-join", "acme-patches 1.2", "active"),
        ("acme.deep-indent", "acme-patches 1.2", "active"),
    }


def test_the_command_line_judges_them(acme: Path, tmp_path: Path) -> None:
    rows = json.loads(run(tmp_path, "-m", "patches", "check", "acme.loud-join", "--json", sites=(acme,)))
    assert [(row["id"], row["verdict"]) for row in rows] == [("acme.loud-join", "needed")]


def test_two_distributions_with_one_id_are_both_named(acme: Path, rival: Path, tmp_path: Path) -> None:
    program = """
import patches
try:
    patches.get("acme.loud-join")
except patches.DuplicatePatchError as error:
    print(error)
"""
    message = run(tmp_path, "-c", program, sites=(acme, rival))
    assert "'acme.loud-join' is claimed twice" in message
    assert "acme-patches 1.2 (acme_patches.loud_join)" in message
    assert "rival-patches 3.0 (acme_patches.loud_join)" in message
