"""`patches audit`: patches in this process, in every process with a journal, or made by others."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .audit import audit as take_audit
from .foreign import changed_files, foreign
from .journal import read_journals
from .table import aligned

__all__ = ["audit", "import_first"]

_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
_Import = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Import this first, and so see what it patches. Repeatable."),
]
_All = Annotated[bool, typer.Option("--all", help="Also what was reverted or skipped.")]
_Journal = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Show every process that ran with PATCHES_JOURNAL=DIR, and which of them differ."),
]
_Foreign = Annotated[
    list[str] | None,
    typer.Option("--foreign", metavar="PACKAGE", help="Show what others have patched in this package. Repeatable."),
]
_Disk = Annotated[
    bool, typer.Option("--disk", help="With --foreign: also compare the installed files with their RECORD.")
]


def audit(
    modules: _Import = None,
    as_json: _AsJson = False,
    everything: _All = False,
    journal: _Journal = None,
    foreign_packages: _Foreign = None,
    disk: _Disk = False,
) -> None:
    """Show the patches of this process: target, scope, time, caller, reason, and state.

    A new process has no patches, so name a module that applies some: `patches audit --import mypackage`.

    With --journal, show the processes that kept a journal side by side instead, and exit with 1 if they differ.
    With --foreign, show what code other than this package has patched, compared with a clean process.
    """
    if disk and not foreign_packages:
        raise typer.BadParameter("it needs --foreign PACKAGE, which says whose files to compare", param_hint="--disk")
    for module in modules or ():
        import_first(module)
    if journal is not None:
        _show_journal(journal, as_json=as_json)
    elif foreign_packages:
        _show_foreign(foreign_packages, as_json=as_json, disk=disk)
    else:
        found = take_audit(include_reverted=everything)
        typer.echo(found.to_json() if as_json else str(found))


def import_first(module: str, *, option: str = "--import") -> None:
    """Import the module that an option names. Raises typer.BadParameter if it cannot be imported."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise typer.BadParameter(f"{module!r} cannot be imported: {error}", param_hint=option) from error


def _show_journal(folder: Path, *, as_json: bool) -> None:
    processes = read_journals(folder)
    typer.echo(processes.to_json() if as_json else str(processes))
    if processes.differences:
        raise typer.Exit(1)


def _show_foreign(packages: list[str], *, as_json: bool, disk: bool) -> None:
    for package in packages:
        import_first(package, option="--foreign")
    found = foreign(*packages)
    changed = changed_files(*packages) if disk else None
    if as_json:
        facts = json.loads(found.to_json())
        files = {} if changed is None else {"files": [asdict(file) for file in changed]}
        typer.echo(json.dumps({**facts, **files}, indent=2))
        return
    typer.echo(str(found))
    if changed is not None:
        rows = [(file.distribution, file.path, file.state) for file in changed]
        typer.echo(aligned(("distribution", "file", "state"), rows) if rows else "every file is as installed")
