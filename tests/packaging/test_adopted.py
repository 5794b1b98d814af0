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
import acme_render, acme_render_patches, patches
with patches.transaction("acme-render", reason="a test"):
    print(acme_render.heading("Title"))
print(acme_render.heading("Title"))
"""
    said = adopted.run("python", "-W", "error", "-c", program, cwd=tmp_path)
    assert said.split() == ["TITLE", "--------", "title", "----"]


def test_its_suite_runs_under_its_patches(adopted: Environment, tmp_path: Path) -> None:
    (tmp_path / "test_render.py").write_text(
        "import acme_render\ndef test_heading():\n    assert acme_render.heading('Title') == 'TITLE\\n----'\n"
    )
    assert "1 passed" in adopted.run("pytest", "--patches", "acme.loud", cwd=tmp_path)
    assert "1 failed" in adopted.run("pytest", cwd=tmp_path, code=1)
