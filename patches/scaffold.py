"""A new patch for an installed target: its module, tests, and entry point."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .errors import PatchError, TargetError
from .patch import Patch
from .registry import ENTRY_POINT_GROUP
from .source import NoSourceError, fingerprint
from .target import Kind, Place, describe, locate, parse
from .template import PATCH, TESTS

__all__ = ["ExistsError", "Scaffold", "scaffold", "write"]

_REASON: Final = "say what goes wrong without it"
_CALLED: Final = (Kind.FUNCTION, Kind.METHOD, Kind.CLASSMETHOD, Kind.STATICMETHOD, Kind.PROPERTY)


class ExistsError(PatchError):
    """A file that is to be written exists already; `path` names it."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} exists; expected a new file: choose another id, package or folder")
        self.path = path


@dataclass(frozen=True, kw_only=True)
class Scaffold:
    """Planned files, and the addition to `pyproject.toml`."""

    files: Mapping[Path, str]
    """Path relative to the project -> text."""
    packages: tuple[Path, ...]
    """`__init__.py` of every parent package, to be created if missing."""
    entry_point: str

    @property
    def tests(self) -> Path:
        """The file with the tests."""
        return list(self.files)[-1]


def scaffold(package: str, *, id: str, target: str, reason: str = "", tests: Path = Path("tests")) -> Scaffold:  # noqa: A002
    """Plan a patch `id` of `target`, in a module of its own in `package`. Imports the target; writes nothing.

    Raises TargetError if the target does not resolve, or is not a function, method or property; DefinitionError
    if the id is invalid.
    """
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in package.split(".")):
        raise PatchError(f"expected a package such as 'my_project.patches', got {package!r}")
    reason = reason or _REASON
    Patch(id=id, target=target, wrapper=_placeholder, reason=reason)  # refuses a bad id or target
    place = describe(target, *locate(target))
    if place.kind not in _CALLED:
        why = f"its kind is {place.kind.value!r}, and the template is for what is called or read"
        raise TargetError(f"no patch was made for {target!r}: {why}", target=target, why=why)
    function = _identifier(id)
    module = f"{package}.{function}"
    words = {**_place_words(place), "id": id, "target": target, "module": module, "function": function}
    words |= {"reason": _quotable(reason), "known": _known(place)}
    folder = Path(*package.split("."))
    return Scaffold(
        files={
            folder / f"{function}.py": PATCH.substitute(words),
            tests / f"test_{function}.py": TESTS.substitute(words),
        },
        packages=tuple(parent / "__init__.py" for parent in [folder, *folder.parents][:-1]),
        entry_point=f'[project.entry-points."{ENTRY_POINT_GROUP}"]\n"{id}" = "{module}"',
    )


def write(planned: Scaffold, root: Path) -> list[Path]:
    """Write the files below `root`; returns their paths. Raises ExistsError before anything is written."""
    for path in planned.files:
        if (root / path).exists():
            raise ExistsError(root / path)
    missing = {path: "" for path in planned.packages if not (root / path).exists()}
    for path, text in (missing | dict(planned.files)).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return [root / path for path in (*missing, *planned.files)]


def _place_words(place: Place) -> dict[str, str]:
    target = parse(place.target)
    owner = ":".join(filter(None, (target.module, ".".join(target.owner_path))))
    return {"owner": owner, "attribute": target.name}


def _known(place: Place) -> str:
    """The fields that tie the patch to the installed version, if known, and source."""
    from importlib import metadata

    package = parse(place.target).module.partition(".")[0]
    lines = [
        f'    requires={{"{name}": "=={metadata.version(name)}"}},  # widen it to the releases that have the defect\n'
        for name in metadata.packages_distributions().get(package, ())[:1]
    ]
    try:
        lines.append(f'    fingerprint="{fingerprint(place)}",  # of the source that this was written for\n')
    except NoSourceError:
        return "".join(lines)
    return "".join(lines)


def _identifier(patch_id: str) -> str:
    name = patch_id.rpartition(".")[2].replace("-", "_")
    return name if name.isidentifier() and not keyword.iskeyword(name) else f"patch_{name}"


def _quotable(reason: str) -> str:
    """The reason as one line that fits in a string literal and in a docstring."""
    return " ".join(reason.split()).replace("\\", "\\\\").replace('"', "'")


def _placeholder(*_: object) -> None:
    """Placeholder wrapper, used while the other fields are checked."""
