"""The command line: parse, ask the package, render."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Annotated, Any, Final

import typer

from .audit import audit as take_audit
from .errors import PatchError
from .patch import Patch
from .plan import verdict
from .registry import REGISTRY
from .table import aligned
from .verdict import Verdict, VerdictKind

__all__ = ["app", "main"]

_UNTRUSTED: Final = (VerdictKind.UNKNOWN, VerdictKind.INCOMPATIBLE)

app = typer.Typer(
    name="patches",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Reversible patches for libraries that you cannot change.\n\n"
    "Start with `patches list`, read one with `patches show ID`, and ask with `patches check` which of them "
    "the installed versions need. Applying is done in Python: `with patches.transaction(ID, reason=...):`.",
)

_Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Every known patch if none is given.")]
_Id = Annotated[str, typer.Argument(metavar="ID", help="As `patches list` shows it.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
_Import = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Import this first, and so see what it patches. Repeatable."),
]
_All = Annotated[bool, typer.Option("--all", help="Also what was reverted or skipped.")]


@app.command("list")
def list_patches(as_json: _AsJson = False) -> None:
    """List every known patch and where it comes from. Imports none of them."""
    known = [{"id": patch_id, "source": REGISTRY.source(patch_id)} for patch_id in REGISTRY.ids()]
    _print(known, as_json=as_json)


@app.command()
def show(patch_id: _Id, as_json: _AsJson = False) -> None:
    """Show everything about one patch, its verdict included. Imports the library that it patches."""
    patch = REGISTRY.get(patch_id)
    facts = {**_facts(patch), **_judgement(verdict(patch))}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(aligned(("field", "value"), [(name, _text(value)) for name, value in facts.items()]))


@app.command()
def check(patch_ids: _Ids = None, as_json: _AsJson = False) -> None:
    """Say of each patch whether the installed versions need it.

    needed: the defect is there. obsolete: it is not; a transaction skips the patch. unknown: the versions are
    outside the window, or the probe raised. incompatible: a library is missing, or the target is gone.

    Exits with 1 where a patch is unknown or incompatible.
    """
    verdicts = {patch_id: verdict(patch_id) for patch_id in patch_ids or REGISTRY.ids()}
    _print([{"id": patch_id, **_judgement(found)} for patch_id, found in verdicts.items()], as_json=as_json)
    if any(found.kind in _UNTRUSTED for found in verdicts.values()):
        raise typer.Exit(1)


@app.command()
def audit(modules: _Import = None, as_json: _AsJson = False, everything: _All = False) -> None:
    """Show what is patched in this process: what, in which scope, since when, by whom, why, and its state.

    A process of its own has nothing patched, so name what patches: `patches audit --import mypackage`.
    """
    for module in modules or ():
        _import(module)
    found = take_audit(include_reverted=everything)
    typer.echo(found.to_json() if as_json else str(found))


def main() -> None:
    """The console script. An error of this package is printed without a traceback, and the exit code is 2."""
    try:
        app()
    except PatchError as error:
        typer.echo(f"patches: {error}", err=True)
        sys.exit(2)


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise typer.BadParameter(f"{module!r} cannot be imported: {error}", param_hint="--import") from error


def _facts(patch: Patch) -> dict[str, Any]:
    return {
        "id": patch.id,
        "target": patch.target,
        "reason": patch.reason,
        "upstream": patch.upstream,
        "requires": dict(patch.requires),
        "kind": patch.kind,
        "traced": patch.traced,
        "after": patch.after,
        "needs": patch.needs,
        "conflicts": patch.conflicts,
        "tags": patch.tags,
        "wrapper": patch.claimant,
    }


def _judgement(found: Verdict) -> dict[str, str]:
    return {"verdict": str(found), "why": found.why}


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _print(rows: list[dict[str, str]], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif rows:
        typer.echo(aligned(tuple(rows[0]), [tuple(row.values()) for row in rows]))
