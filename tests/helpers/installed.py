"""Distributions built and installed as a user installs them: in virtual environments with nothing else in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Environment", "build_wheel"]


def _pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, env=_environment(), check=True, timeout=240)


def _environment() -> dict[str, str]:
    """The environment without this process's paths and options, which would be found in others too."""
    ours = ("PYTHON", "PYTEST", "PATCHES")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def build_wheel(source: Path, folder: Path) -> Path:
    """Build the project in `source` from a copy, with the setuptools that is installed here; return the wheel."""
    copy = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    shutil.copytree(source, copy, ignore=ignored)
    _pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, copy)
    (wheel,) = folder.glob("*.whl")
    return wheel


@dataclass(frozen=True)
class Environment:
    """A virtual environment in `folder`, made by `create`."""

    folder: Path

    @classmethod
    def create(cls, folder: Path, *requirements: str) -> Environment:
        """Make the environment, and install what pip understands as requirements, with their dependencies."""
        venv.create(folder, symlinks=True, with_pip=False)
        made = cls(folder)
        made.install(*requirements)
        return made

    @property
    def bin(self) -> Path:
        """Where its Python and its console scripts are."""
        return self.folder / "bin"

    def install(self, *requirements: str) -> None:
        """Install requirements, from PyPI where they are names."""
        _pip("--python", self.bin / "python", "install", *requirements)

    def run(self, *command: str | Path, cwd: Path, code: int = 0, **environment: str) -> str:
        """Run a program of its `bin` in `cwd`, and return what it printed, errors included.

        Nothing of this process's paths is seen there. Raises AssertionError unless it exits with `code`.
        """
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        ran = subprocess.run(
            [self.bin / command[0], *command[1:]],
            env={**_environment(), "PATH": path, "COLUMNS": "200", **environment},
            cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert ran.returncode == code, f"{command} exited with {ran.returncode}, not {code}:\n{ran.stdout}"
        return ran.stdout
