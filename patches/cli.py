"""The command line: parse, ask the package, render."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from .aliases import aliases as find_aliases
from .cli_audit import audit, import_first
from .cli_new import new
from .cli_run import check_lock, lock, run
from .errors import PatchError, TargetError
from .patch import Patch
from .plan import fingerprint_of, is_seen_when_compiled, verdict
from .plan import plan as make_plan
from .registry import REGISTRY
from .run import offer
from .select import select
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

_SELECTORS_HELP: Final = "An id, a bundle, `tag:word`, or a glob such as `torch.*`."
_Selectors = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SELECTOR]...", help=f"{_SELECTORS_HELP} Every known patch if none is given."),
]
_Planned = Annotated[list[str], typer.Argument(metavar="SELECTOR...", help=_SELECTORS_HELP)]
_Fingerprint = Annotated[bool, typer.Option("--fingerprint", help="Print the fingerprint of the target's source only.")]
_Force = Annotated[bool, typer.Option("--force", help="As `transaction(force=True)`: obsolete ones too.")]
_Id = Annotated[str, typer.Argument(metavar="ID", help="As `patches list` shows it.")]
_Patch = Annotated[str, typer.Argument(metavar="ID|TARGET", help="A patch, or `package.module:name`.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
_Import = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Import this first, for what it patches or registers. Repeatable."),
]
_Lock = Annotated[
    Path | None,
    typer.Option("--lock", metavar="FILE", help="Say what differs from this file, which `patches lock` wrote."),
]


@app.command("list")
def list_patches(as_json: _AsJson = False) -> None:
    """List every known patch and its source. Imports none of them."""
    known = [{"id": patch_id, "source": REGISTRY.source(patch_id)} for patch_id in REGISTRY.ids()]
    _print(known, as_json=as_json)


@app.command()
def show(patch_id: _Id, as_json: _AsJson = False, only_fingerprint: _Fingerprint = False) -> None:
    """Show everything about one patch, its verdict included. Imports the library that it patches.

    With --fingerprint, print the fingerprint of the installed upstream source, to use in the patch's declaration.
    """
    patch = REGISTRY.get(patch_id)
    if only_fingerprint:
        typer.echo(fingerprint_of(patch))
        return
    found = verdict(patch)
    facts = {**_facts(patch), **_judgement(found), **_under_compile(patch, found)}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(aligned(("field", "value"), [(name, _text(value)) for name, value in facts.items()]))


@app.command()
def check(
    selectors: _Selectors = None, modules: _Import = None, as_json: _AsJson = False, lock_file: _Lock = None
) -> None:
    """Report for each patch whether the installed versions need it.

    A patch without an entry point is known once its module is imported: `--import my_project.patches`.

    needed: the defect is present. obsolete: it is absent; a transaction skips the patch. unknown: the versions are
    outside the window, the source or the signature of the target has changed, somebody else has patched it, or the
    probe raised. incompatible: a library is missing, or the target does not exist.

    Exits with 1 if a patch is unknown or incompatible; with --lock, if anything differs from the file.
    """
    for module in modules or ():
        import_first(module)
    if lock_file is not None:
        check_lock(lock_file, selectors or (), as_json=as_json)
        return
    verdicts = {patch_id: verdict(patch_id) for patch_id in (select(*selectors) if selectors else REGISTRY.ids())}
    rows = [{"id": patch_id, **_judgement(found)} for patch_id, found in verdicts.items()]
    if as_json:
        details = [_details(patch_id, found) for patch_id, found in verdicts.items()]
        typer.echo(json.dumps([{**row, **more} for row, more in zip(rows, details, strict=True)], indent=2))
    else:
        _print(rows, as_json=False)
    if any(found.kind in _UNTRUSTED for found in verdicts.values()):
        raise typer.Exit(1)


app.command()(audit)
app.command()(new)
app.command(context_settings={"allow_interspersed_args": False})(run)
app.command()(lock)


@app.command()
def aliases(patch: _Patch, modules: _Import = None, as_json: _AsJson = False) -> None:
    """List the copies of a target in other modules, such as `from x import f` makes.

    A patch does not reach a copy that holds the original, unless declared with aliases="rewrite".
    """
    for module in modules or ():
        import_first(module)
    found = [asdict(alias) for alias in find_aliases(patch)]
    if as_json or found:
        _print(found, as_json=as_json)
    else:
        typer.echo("no copy in any module that is loaded")


@app.command()
def plan(selectors: _Planned, force: _Force = False) -> None:
    """Show which patches a transaction would apply, in which order, and why. Changes nothing.

    Includes the patches that others need. Exits with 2 if the transaction would be refused, and prints the reason.
    """
    typer.echo(make_plan(*selectors, force=force).explain())


def main() -> None:
    """Run the console script. Errors of this package are printed without a traceback, with exit code 2.

    Modules and patches of a project in the current folder are found, though it is not installed.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    offer(here)
    try:
        app()
    except PatchError as error:
        typer.echo(f"patches: {error}", err=True)
        sys.exit(2)


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
        "fingerprint": patch.fingerprint,
        "signature": patch.signature,
        "on_drift": patch.on_drift,
        "on_foreign": patch.on_foreign,
        "wrapper": patch.claimant,
    }


def _judgement(found: Verdict) -> dict[str, str]:
    return {"verdict": str(found), "why": found.why}


def _details(patch_id: str, found: Verdict) -> dict[str, Any]:
    compiled = _under_compile(REGISTRY.get(patch_id), found)
    return {"since": found.since, "drift": found.drift, "foreign": found.foreign, **compiled}


def _under_compile(patch: Patch, found: Verdict) -> dict[str, str]:
    if found.kind == VerdictKind.INCOMPATIBLE:
        return {}
    try:
        seen = is_seen_when_compiled(patch)
    except TargetError:  # an obsolete patch, whose target this release does not have
        return {}
    return {"torch.compile": "traced" if seen else "passed by: declare it traced=True if that compiles its target"}


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _print(rows: list[dict[str, str]], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif rows:
        typer.echo(aligned(tuple(rows[0]), [tuple(row.values()) for row in rows]))
