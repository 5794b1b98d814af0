"""Releases of upstream libraries, each installed into a folder of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["InstallError", "Release", "environment", "install"]


class InstallError(Exception):
    """pip could not install a release; the message has the end of its output."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """One version of one distribution."""

    name: str
    version: str
    with_also: tuple[str, ...] = ()
    """Requirements of this release whose installed versions do not fit."""

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def install(release: Release, folder: Path) -> Path:
    """Install a release without its dependencies below `folder`, unless it is there; returns its folder.

    Raises InstallError. Remains of an interrupted installation are removed first.
    """
    place = folder / f"{release.name}-{release.version}"
    if place.is_dir():
        return place
    part = place.with_name(f"{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    what = [f"{release.name}=={release.version}", *release.with_also]
    ran = subprocess.run(
        [*pip, "--no-deps", "--no-compile", "--target", part, *what], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise InstallError(f"{release} could not be installed: {ran.stderr.strip()[-500:]}")
    part.rename(place)
    return place


def environment(folders: Iterable[Path]) -> dict[str, str]:
    """Environment variables of a process in which modules in `folders` take precedence over installed ones."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder.resolve()) for folder in folders)}
