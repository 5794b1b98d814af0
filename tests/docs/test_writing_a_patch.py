"""`docs/writing-a-patch.md`, followed literally: an empty folder, a new environment, the installed distribution."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_docs import ROOT, blocks
from tests.helpers.wheelhouse import stock


def script(page: str, scratch: Path) -> str:
    """The page as one shell session: files are written, commands and programs run as printed."""
    lines = ["set -euo pipefail"]
    for block in blocks(page):
        lines.append(f"echo '== line {block.line}'")
        if block.language == "console":
            lines += [line.removeprefix("$ ") for line in block.text.splitlines()]
            lines += ['rm -rf "$CHECKOUT"']  # the first block has installed it
            continue
        file = shlex.quote(block.file or str(scratch / f"line_{block.line}.py"))
        lines.append(f"cat > {file} <<'END OF BLOCK'\n{block.text}END OF BLOCK")
        if block.file is None:
            lines.append(f"python -W error {file}")
    return "\n".join(lines)


@pytest.mark.slow
def test_the_page_holds_from_an_empty_folder(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("empty", "wheels", "scratch", "checkout")}
    for folder in folders.values():
        folder.mkdir()
    shutil.copytree(ROOT / "patches", folders["checkout"] / "patches")
    offline = stock(folders["wheels"], "packaging", "wrapt", "rich", "typer", "pytest", "setuptools")
    ran = subprocess.run(
        ["bash", "-c", script("writing-a-patch.md", folders["scratch"])],
        cwd=folders["empty"],
        env={
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.defpath)),
            "HOME": str(tmp_path),
            "CHECKOUT": str(folders["checkout"]),
            **offline,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    project = folders["empty"] / "my-project"
    (site,) = project.glob(".venv/lib/*/site-packages")
    assert (site / "patches" / "__init__.py").exists()
    assert not (site / "torch").exists()
    checked = ("my_project", "tests/test_no_nan.py", "demo.py")
    for tool in (
        ["mypy", "--strict", "--python-executable", str(project / ".venv" / "bin" / "python")],
        ["ruff", "check", "--isolated", "--line-length", "120"],
        ["ruff", "format", "--check", "--isolated", "--line-length", "120"],
    ):
        command = [sys.executable, "-m", *tool, *checked]
        ran = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120, check=False)
        assert ran.returncode == 0, ran.stdout
