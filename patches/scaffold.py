"""A new patch for an installed target: its module, its tests, which pass as written, and its entry point."""

from __future__ import annotations

import contextlib
import importlib.util
import keyword
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Final

from .drift import NoSourceError, fingerprint
from .errors import PatchError, TargetError
from .patch import Patch
from .registry import ENTRY_POINT_GROUP
from .target import Kind, Place, describe, locate, parse

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


def scaffold(
    package: str,
    *,
    id: str,  # noqa: A002
    target: str,
    reason: str = "",
    upstream: str = "",
    tests: Path = Path("tests"),
) -> Scaffold:
    """Plan a patch `id` of `target`, in a module of its own in `package`. Imports the target; writes nothing.

    Raises TargetError if the target does not resolve, or is not a function, method or property; DefinitionError
    if the id is invalid.
    """
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in package.split(".")):
        raise PatchError(f"expected a package such as 'my_project.patches', got {package!r}")
    parsed = parse(target)
    place = describe(parsed, locate(parsed))
    if place.kind not in _CALLED:
        why = f"its kind is {place.kind.value!r}, and the template is for what is called or read"
        raise TargetError(f"no patch was made for {target!r}: {why}", target=target, why=why)
    reason = reason or _REASON
    Patch(id=id, target=target, wrapper=_placeholder, reason=reason)  # refuses a bad id
    function = _identifier(id)
    words = {
        "id": id,
        "target": target,
        "owner": ":".join(filter(None, (parsed.module, ".".join(parsed.owner_path)))),
        "attribute": parsed.name,
        "module": f"{package}.{function}",
        "function": function,
        "reason": _quotable(reason),
        "known": "".join(f"    {line}\n" for line in _known(place, _quotable(upstream))),
    }
    folder = Path(*package.split("."))
    return Scaffold(
        files={
            folder / f"{function}.py": _PATCH.substitute(words),
            tests / f"test_{function}.py": _TESTS.substitute(words),
        },
        packages=tuple(parent / "__init__.py" for parent in [folder, *folder.parents][:-1]),
        entry_point=f'[project.entry-points."{ENTRY_POINT_GROUP}"]\n"{id}" = "{words["module"]}"',
    )


def write(planned: Scaffold, root: Path) -> list[Path]:
    """Write the files below `root`; returns their paths. Raises PatchError before anything is written, if one of them
    exists, or their package would hide one that is not there.
    """
    package = (root / planned.packages[-1]).parent
    found = None if package.exists() else importlib.util.find_spec(package.name)
    if found is not None:
        hidden = f"which would hide that in {found.origin}; choose another, or name its project with --root"
        raise PatchError(f"expected a package of your own, got {package.name!r}, {hidden}")
    for path in planned.files:
        if (root / path).exists():
            raise ExistsError(root / path)
    missing = {path: "" for path in planned.packages if not (root / path).exists()}
    for path, text in (missing | dict(planned.files)).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return [root / path for path in (*missing, *planned.files)]


def _known(place: Place, upstream: str) -> Iterator[str]:
    """The fields that say where the defect is reported, in which version it was seen, and in which source."""
    from importlib import metadata

    package = place.target.module.partition(".")[0]
    if upstream:
        yield f'upstream="{upstream}",'
    for name in metadata.packages_distributions().get(package, ())[:1]:
        yield f'requires={{"{name}": "=={metadata.version(name)}"}},  # widen it to what has the defect'
    with contextlib.suppress(NoSourceError):
        yield f'fingerprint="{fingerprint(place)}",  # of the source that this was written for'


def _identifier(patch_id: str) -> str:
    name = patch_id.rpartition(".")[2].replace("-", "_")
    return name if name.isidentifier() and not keyword.iskeyword(name) else f"patch_{name}"


def _quotable(reason: str) -> str:
    """The reason as one line that fits in a string literal and in a docstring."""
    return " ".join(reason.split()).replace("\\", "\\\\").replace('"', "'")


def _placeholder(*_: object) -> None:
    """Placeholder wrapper, used while the other fields are checked."""


_PATCH: Final = Template('''\
"""`$id`: $reason"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import patches

__all__ = ["$function"]


def defect_is_there() -> bool:
    """Whether the installed release has the defect; if not, the patch is skipped."""
    # 1. Use the library in the way that shows the defect. Leave nothing behind.
    return True


def check_effect() -> None:
    """Raise RuntimeError if the applied patch does not have its effect."""
    # 2. Use the library as above, and raise if the defect still shows.


@patches.register(
    "$id",
    target="$target",
    reason="$reason",
$known    probe=defect_is_there,
    verify=check_effect,
)
def $function(
    wrapped: Callable[..., Any],
    instance: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Replacement for `$target`."""
    # 3. Change what goes into `wrapped`, the stock code, or what comes out of it.
    return wrapped(*args, **kwargs)
''')

_TESTS: Final = Template('''\
"""`$id`: whether it is needed, its effect, and its complete removal."""

from __future__ import annotations

import pkgutil

import patches

from $module import $function

ID = "$id"
OWNER = pkgutil.resolve_name("$owner")


def test_the_installed_release_needs_it() -> None:
    assert str(patches.verdict(ID)) == "needed"


def test_it_has_its_effect_and_nothing_is_left_of_it() -> None:
    before = vars(OWNER).get("$attribute")
    with patches.transaction(ID, reason="a test") as transaction:
        assert transaction.receipts[0].patch.wrapper is $function
        assert vars(OWNER)["$attribute"] is not before
        # 4. Call the library here, and assert that the defect is gone.
    assert vars(OWNER).get("$attribute") is before
''')
