"""A checkout: one command installs both distributions."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

from tests.packaging.conftest import ROOT


def test_make_venv_installs_again_when_either_project_has_changed(tmp_path: Path) -> None:
    sources = ("Makefile", "pyproject.toml", "patches/pyproject.toml", "constraints.txt")
    for name in sources:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
        os.utime(tmp_path / name, (1, 1))
    stamp = tmp_path / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    os.utime(stamp, (2, 2))
    question = ["make", "--question", "venv"]
    assert subprocess.run(question, cwd=tmp_path, timeout=60, check=False).returncode == 0
    for name in sources[1:]:
        os.utime(tmp_path / name, (3, 3))
        assert subprocess.run(question, cwd=tmp_path, timeout=60, check=False).returncode == 1, name
        os.utime(tmp_path / name, (1, 1))


def test_surgery_requires_the_registry_of_its_own_release() -> None:
    surgery, patches = (
        tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"] for folder in (".", "patches")
    )
    assert f"model-surgery-patches[cli]=={patches['version']}" in surgery["dependencies"]
