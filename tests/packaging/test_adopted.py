"""A distribution of somebody else, with patches of its own library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.installed import Environment

pytestmark = pytest.mark.network


def test_its_patches_are_found_by_id(adopted: Environment, tmp_path: Path) -> None:
    listed = json.loads(adopted.run("patches", "list", "--json", cwd=tmp_path))
    sources = {row["id"]: row["source"] for row in listed if row["id"].startswith("acme.")}
    assert sources == dict.fromkeys(
        ("acme.wide", "acme.loud", "acme.of-what-is-absent"), "acme-render 2.1 (acme_render_patches)"
    )
    rows = json.loads(adopted.run("patches", "check", "acme.*", "--json", cwd=tmp_path))
    assert {row["id"]: row["verdict"] for row in rows} == {
        "acme.wide": "needed",
        "acme.loud": "needed",
        "acme.of-what-is-absent": "absent",
    }


def test_its_bundle_is_applied_and_undone(adopted: Environment, tmp_path: Path) -> None:
    program = """
import acme_render, patches
with patches.transaction("acme-render", reason="a test"):
    print(acme_render.heading("Title"))
print(acme_render.heading("Title"))
"""
    said = adopted.run("python", "-W", "error", "-c", program, cwd=tmp_path)
    assert said.split() == ["TITLE", "--------", "title", "----"]


def test_an_atomic_bundle_of_what_is_not_all_there_is_not_applied_at_all(adopted: Environment, tmp_path: Path) -> None:
    program = """
import acme_render, patches
try:
    patches.transaction("acme-engine").__enter__()
except patches.IncompatibleError as error:
    print(error)
print(acme_render.heading("Title"))
"""
    said = adopted.run("python", "-W", "error", "-c", program, cwd=tmp_path)
    assert "acme.of-what-is-absent" in said
    assert said.split()[-2:] == ["title", "----"]


SPAWNED = """
import multiprocessing
import acme_render

def child(_): return acme_render.heading("Child")

if __name__ == "__main__":
    print(acme_render.heading("Title"))
    print(*multiprocessing.get_context("spawn").Pool(1).map(child, [0]))
"""


def test_a_script_and_the_processes_that_it_spawns_run_under_its_patches(adopted: Environment, tmp_path: Path) -> None:
    (tmp_path / "serve.py").write_text(SPAWNED)
    said = adopted.run("patches", "run", "--apply", "acme-render", "--", "serve.py", cwd=tmp_path)
    assert said.split() == ["TITLE", "--------", "CHILD", "--------"]
    assert adopted.run("python", "serve.py", cwd=tmp_path).split() == ["title", "----", "child", "----"]


def test_its_lock_fails_where_the_library_has_moved(adopted: Environment, tmp_path: Path) -> None:
    adopted.run("patches", "lock", "acme-render", "-o", "patches.lock", cwd=tmp_path)
    assert "everything is as in" in adopted.run("patches", "check", "--lock", "patches.lock", cwd=tmp_path)
    moved = tmp_path / "moved" / "acme_render"
    moved.mkdir(parents=True)
    (moved / "__init__.py").write_text("WIDTH = 4\ndef heading(text):\n    return text\n")
    command = ("patches", "check", "--lock", "patches.lock")
    said = adopted.run(*command, cwd=tmp_path, code=1, PYTHONPATH=str(moved.parent))
    assert "acme.loud" in said
    assert "acme.wide" not in said


def test_its_suite_runs_under_its_patches(adopted: Environment, tmp_path: Path) -> None:
    (tmp_path / "test_render.py").write_text(
        "import acme_render\ndef test_heading():\n    assert acme_render.heading('Title') == 'TITLE\\n----'\n"
    )
    assert "1 passed" in adopted.run("pytest", "--patches", "acme.loud", cwd=tmp_path)
    assert "1 failed" in adopted.run("pytest", cwd=tmp_path, code=1)
