"""`model-surgery-patches` as others get it: its wheel in an environment without torch, alone or with an adopter's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.installed import Environment, build_wheel

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of `./patches`."""
    return build_wheel(ROOT / "patches", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """An environment with that wheel, its command line, and pytest. Not to be changed."""
    return Environment.create(tmp_path_factory.mktemp("alone"), f"{wheel}[cli]", "pytest")


@pytest.fixture(scope="session")
def adopted(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """As `alone`, with the distribution `acme-render` of `tests/packaging/adopter` too. Not to be changed."""
    adopter = build_wheel(Path(__file__).with_name("adopter"), tmp_path_factory.mktemp("adopter"))
    return Environment.create(tmp_path_factory.mktemp("adopted"), f"{wheel}[cli]", "pytest", str(adopter))
