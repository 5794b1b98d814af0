"""`patches new`: a new patch and its tests, to be completed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .scaffold import scaffold, write

__all__ = ["new"]

_Package = Annotated[str, typer.Argument(metavar="PACKAGE", help="Where the patch goes, such as `my_project.patches`.")]
_Id = Annotated[str, typer.Option("--id", metavar="ID", help="`upstream.kebab-name`; the module is named after it.")]
_Target = Annotated[str, typer.Option("--target", metavar="TARGET", help="`package.module:Class.attribute`.")]
_Reason = Annotated[str, typer.Option(metavar="TEXT", help="The defect, in a sentence.")]
_Root = Annotated[Path, typer.Option(metavar="DIR", help="What packages are found in: the project, or its `src`.")]
_Tests = Annotated[Path, typer.Option(metavar="DIR", help="Where the tests go, below the root unless absolute.")]


def new(
    package: _Package,
    patch_id: _Id,
    target: _Target,
    reason: _Reason = "",
    root: _Root = Path(),
    tests: _Tests = Path("tests"),
) -> None:
    """Write a new patch and its tests, tied to the installed version and source of the target.

    The tests pass as written. Then complete, in this order: the probe, which tries for the defect; the wrapper,
    which fixes it; the verification of its effect.
    """
    sys.path.insert(0, str(root.resolve()))  # the target may be in the project itself
    planned = scaffold(package, id=patch_id, target=target, reason=reason, tests=tests)
    for path in write(planned, root):
        typer.echo(f"wrote {path}")
    typer.echo(f"\nNow add to pyproject.toml, so that others find it by its id:\n\n{planned.entry_point}\n")
    typer.echo(f"and run: python -m pytest {root / planned.tests}")
