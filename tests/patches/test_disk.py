from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import patches
from patches import versions
from patches.cli import app

FILES = {"crate/__init__.py": b"x = 1\n", "crate/data.bin": bytes(1000), "crate/gone.py": b"", "crate/free.py": b"y\n"}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution as pip leaves it, with one file whose hash is not recorded."""
    record = []
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.append(f"{name},," if name == "crate/free.py" else f"{name},sha256={digest},{len(content)}")
    info = tmp_path / "crate-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: crate\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("crate\n")
    (info / "RECORD").write_text("\n".join([*record, "crate-1.0.dist-info/RECORD,,", ""]))
    monkeypatch.syspath_prepend(tmp_path)
    versions.distributions_of.cache_clear()
    return tmp_path


def test_what_is_as_installed_is_not_listed(installed: Path) -> None:
    (installed / "crate" / "free.py").write_text("anything, for no hash is recorded")
    (installed / "crate" / "__pycache__").mkdir()
    assert patches.changed_files("crate") == []
    assert "every file is as installed" in command().stdout


def test_modified_and_missing_files_are_listed(installed: Path) -> None:
    (installed / "crate" / "__init__.py").write_bytes(b"x = 2\n")
    (installed / "crate" / "data.bin").write_bytes(bytes(999))
    (installed / "crate" / "gone.py").unlink()
    changed = patches.changed_files("crate")
    assert [(file.path, file.state) for file in changed] == [
        ("crate/__init__.py", "modified"),
        ("crate/data.bin", "modified"),
        ("crate/gone.py", "missing"),
    ]
    assert {file.distribution for file in changed} == {"crate 1.0"}
    assert command().stdout.splitlines()[-1].split() == ["crate", "1.0", "crate/gone.py", "missing"]
    assert len(json.loads(command("--json").stdout)["files"]) == 3


def test_a_package_without_a_record_is_refused(installed: Path) -> None:
    with pytest.raises(patches.ForeignError, match="no installed distribution owns 'json'"):
        patches.changed_files("json")
    (installed / "crate-1.0.dist-info" / "RECORD").unlink()
    with pytest.raises(patches.ForeignError, match=r"crate 1\.0 has no RECORD"):
        patches.changed_files("crate")


def test_disk_needs_a_package() -> None:
    ran = CliRunner().invoke(app, ["audit", "--disk"])
    assert ran.exit_code == 2
    assert "--foreign" in ran.stderr


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["audit", "--foreign", "crate", "--disk", *arguments])
