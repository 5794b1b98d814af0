"""The pages of `docs/` that teach by example do what they say: their blocks are run, in order, in a new project."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from patches.builtin import BUILTIN

ROOT = Path(__file__).parents[2]
PAGES = (
    "patches-from-outside.md",
    "fsdp2-exactness.md",
    "writing-a-pass.md",
    "writing-an-integration.md",
    "training-state.md",
)

BLOCK = re.compile(
    r"(?:<!-- file: (?P<file>\S+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One code block: its text, language, the file that it is to be in, and its line on the page."""

    text: str
    language: str
    file: str | None
    line: int


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / "docs" / page).read_text()
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(text=found["text"], language=found["language"], file=found["file"], line=line)


def commands(block: Block) -> Iterator[list[str]]:
    """What to run for a block; nothing for a file, or for a language that is not run."""
    if block.file is None and block.language == "python":
        yield [sys.executable, "-W", "error", "-c", block.text]
    if block.language == "console":
        for line in block.text.splitlines():
            name, *arguments = shlex.split(line.removeprefix("$ "))
            yield [sys.executable, *(() if name == "python" else ("-m", name)), *arguments]


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_in_order(page: str, tmp_path: Path) -> None:
    path = os.pathsep.join(map(str, (tmp_path, ROOT)))
    for block in blocks(page):
        if block.file is not None:
            assert (tmp_path / block.file).parent.is_dir()
            (tmp_path / block.file).write_text(block.text)
        for command in commands(block):
            ran = subprocess.run(
                command,
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": path},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert ran.returncode == 0, f"{page}, line {block.line}: {command}\n{ran.stdout}{ran.stderr}"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_what_is_to_be_run(page: str) -> None:
    found = list(blocks(page))
    assert {block.language for block in found} >= {"python", "console"}
    assert all(block.language in ("python", "console", "toml") for block in found)
    assert (ROOT / "docs" / page).read_text().count("```") == 2 * len(found)


def test_the_sweep_has_asked_every_patch() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text()
    assert [patch_id for patch_id in BUILTIN if f"| `{patch_id}` |" not in text] == []


LINK = re.compile(r"\]\((?P<path>[^)#\s:]*)(?:#(?P<heading>[^)\s]+))?\)")


def headings(text: str) -> set[str]:
    """The names by which GitHub lets the headings of a page be linked to."""
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.stem
)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.finditer(BLOCK.sub("", page.read_text())):
        to = page.parent / link["path"] if link["path"] else page
        assert to.exists(), link[0]
        assert link["heading"] is None or link["heading"] in headings(to.read_text()), link[0]
