"""Wheels made from what is installed here, so that pip can build and install in a new environment without a network."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def stock(folder: Path, *names: str) -> dict[str, str]:
    """Put a wheel of these distributions, and of all that they require, into a folder; returns the environment in which
    pip uses that folder and nothing else.
    """
    for distribution in _with_requirements(names):
        _pack(folder, distribution)
    options = {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": os.devnull, "DISABLE_PIP_VERSION_CHECK": "1"}
    return {f"PIP_{name}": value for name, value in options.items()}


def _with_requirements(names: tuple[str, ...]) -> Iterator[metadata.Distribution]:
    pending, seen = list(names), set[str]()
    while pending:
        name = pending.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        distribution = metadata.distribution(name)
        yield distribution
        required = map(Requirement, distribution.requires or ())
        pending += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]


def _pack(folder: Path, distribution: metadata.Distribution) -> None:
    """Zip the files of an installed distribution; scripts and bytecode, which pip makes, are left out."""
    name = distribution.metadata["Name"].replace("-", "_")
    wheel = distribution.read_text("WHEEL") or ""
    # Any tag names what was installed here, apart from the py2 of a wheel for both.
    tag = max(line.removeprefix("Tag: ") for line in wheel.splitlines() if line.startswith("Tag: "))
    files = [file for file in distribution.files or () if ".." not in file.parts and file.suffix != ".pyc"]
    with zipfile.ZipFile(folder / f"{name}-{distribution.version}-{tag}.whl", "w") as archive:
        for file in files:
            if file.name not in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
                archive.write(str(file.locate()), str(file))
        record = next(file for file in files if file.name == "RECORD")
        archive.writestr(str(record), "".join(f"{file},,\n" for file in files if file.name != "RECORD"))
