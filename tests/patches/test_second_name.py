"""The package by its second name, which works beside a file or folder of somebody else's called `patches`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SHADOWS = ("patches.py", "patches/__init__.py")

#: Nothing of ours may be loaded from one file under two names.
TWICE = """
import collections, sys
names = collections.defaultdict(set)
for module in list(sys.modules.values()):
    if "/patches/" in (getattr(module, "__file__", None) or ""):
        names[module.__file__].add(id(module))
assert [file for file, modules in names.items() if len(modules) > 1] == []
"""


def run(folder: Path, *command: str, sites: tuple[Path, ...] = (), **environment: str) -> str:
    """What Python prints in `folder`, which is first in `sys.path`; nothing of ours need be installed."""
    path = os.pathsep.join(map(str, (*sites, ROOT)))
    ran = subprocess.run(
        [sys.executable, "-W", "error", *command],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(params=SHADOWS)
def shadow(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Somebody else's `patches`, in the current folder of `run`."""
    file = tmp_path / request.param
    file.parent.mkdir(exist_ok=True)
    file.write_text("MINE = True\n")
    return file


@pytest.mark.parametrize("first", ["patches", "model_surgery_patches"])
def test_both_names_are_one_package(tmp_path: Path, first: str) -> None:
    program = (
        f"""
import {first}.errors
import model_surgery_patches as second, model_surgery_patches.registry as registry, model_surgery_patches.cli
import patches, patches.registry, patches.cli
from patches.errors import PatchError
from model_surgery_patches.builtin.torch import fsdp1_raw_reads
import patches.builtin.torch.fsdp1_raw_reads as same
assert second is patches and registry is patches.registry and fsdp1_raw_reads is same
assert PatchError is second.errors.PatchError is second.PatchError
assert patches.__name__ == "patches"
assert same.__name__ == same.__spec__.name == "patches.builtin.torch.fsdp1_raw_reads"
try:
    import model_surgery_patches.nothing
except ModuleNotFoundError as error:
    assert error.name == "model_surgery_patches.nothing"
else:
    raise AssertionError
"""
        + TWICE
    )
    run(tmp_path, "-c", program)


def test_a_file_of_that_name_keeps_it_and_the_package_has_the_other(shadow: Path, tmp_path: Path) -> None:
    program = (
        """
import textwrap
import model_surgery_patches as registry
import model_surgery_patches.cli
import patches
assert patches.MINE
@registry.register("stdlib.loud", target="textwrap:shorten", reason="a test")
def loud(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs).upper()
with registry.transaction("stdlib.loud", reason="a test"):
    assert textwrap.shorten("all  is well", 40) == "ALL IS WELL"
    assert [found.id for found in registry.foreign("textwrap")] == []
assert registry.active() == []
assert registry.get("torch.fsdp1-raw-reads").module == "model_surgery_patches.builtin.torch.fsdp1_raw_reads"
print(registry.__shadowed_by__, registry.__file__)
"""
        + TWICE
    )
    assert run(tmp_path, "-c", program).split() == [str(shadow), str(ROOT / "patches" / "__init__.py")]


def test_a_name_that_becomes_free_leads_to_the_same_package(shadow: Path, tmp_path: Path) -> None:
    program = (
        """
import sys
import model_surgery_patches
sys.path.remove("")
import patches, patches.registry
assert patches is model_surgery_patches and patches.registry.REGISTRY is model_surgery_patches.registry.REGISTRY
"""
        + TWICE
    )
    run(tmp_path, "-c", program)


def test_a_file_that_is_run_or_imported_already_is_somebody_elses_too(shadow: Path, tmp_path: Path) -> None:
    shadow.write_text("import model_surgery_patches\nassert model_surgery_patches.transaction\nMINE = True\n")
    run(tmp_path, str(shadow))
    run(tmp_path, "-c", "import patches; assert patches.MINE")


def test_patches_of_another_distribution_are_found_beside_such_a_file(
    shadow: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    site = tmp_path_factory.mktemp("site")
    (site / "acme.py").write_text(
        "import model_surgery_patches as patches\n"
        "@patches.register('acme.loud', target='textwrap:shorten', reason='a test')\n"
        "def loud(wrapped, instance, args, kwargs):\n"
        "    return wrapped(*args, **kwargs).upper()\n"
    )
    info = site / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[patches.registry]\nacme.loud = acme\n")
    program = """
import textwrap
import model_surgery_patches as patches
with patches.transaction("acme.loud", reason="a test"):
    print(textwrap.shorten("all  is well", 40))
"""
    assert run(tmp_path, "-c", program, sites=(site,)) == "ALL IS WELL\n"
    rows = json.loads(run(tmp_path, "-m", "model_surgery_patches", "check", "acme.loud", "--json", sites=(site,)))
    assert [row["verdict"] for row in rows] == ["needed"]
    (site / "acme.py").write_text((site / "acme.py").read_text().replace("model_surgery_patches as ", ""))
    program = """
import model_surgery_patches
try:
    model_surgery_patches.get("acme.loud")
except AttributeError as error:
    print(*error.__notes__)
"""
    assert f"`import patches` leads to {shadow} here" in run(tmp_path, "-c", program, sites=(site,))


def test_the_plugin_leaves_the_name_to_the_file_that_tests_mean(shadow: Path, tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "import model_surgery_patches\n"
        "import patches\n"
        "def test_mine(patched):\n"
        "    assert patches.MINE\n"
        "    assert patched.__module__ == 'model_surgery_patches.testing.plugin'\n"
    )
    plugin = ("-p", "model_surgery_patches.testing.plugin", "-p", "no:cacheprovider")
    out = run(tmp_path, "-m", "pytest", *plugin, "test_mine.py", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert "1 passed" in out
    program = "import pytest, sys; sys.path.remove(''); sys.exit(pytest.main(sys.argv[1:]))"  # as the script does it
    out = run(tmp_path, "-c", program, *plugin, "test_mine.py", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert "1 passed" in out
