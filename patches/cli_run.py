"""`patches run` and `patches lock`, and `check --lock`."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .manifest import changes, read, write
from .manifest import lock as make_lock
from .run import command as command_of
from .run import environment

__all__ = ["check_lock", "lock", "run"]

_Command = Annotated[
    list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="`script.py ...`, `-m module ...`, or a program.")
]
_Apply = Annotated[
    list[str] | None,
    typer.Option("--apply", metavar="IDS", help="What to apply: ids, bundles or selectors, separated by commas."),
]
_Import = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Import this first, for what it registers or applies. Repeatable."),
]
_Locked = Annotated[list[str] | None, typer.Argument(metavar="[SELECTOR]...", help="Everything in force if none.")]
_Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Written whole or not at all.")]


def run(command: _Command = None, apply: _Apply = None, modules: _Import = None) -> None:
    """Run a script, a module or a program, and every Python process that it starts, with patches.

    Each patch is applied when its target is imported. Without a command, print the environment that does it, for
    `eval "$(patches run --apply IDS)"` in a shell. Exits with 2 if an id is unknown; otherwise this
    process becomes the command.
    """
    selectors = [word.strip() for words in apply or () for word in words.split(",") if word.strip()]
    wanted = environment(*selectors, imports=modules or ())
    if not command:
        added = (
            f"export {name}={shlex.quote(wanted[name])}" for name in wanted if wanted[name] != os.environ.get(name)
        )
        typer.echo("\n".join(added))
        return
    arguments = command_of(command)
    sys.stdout.flush()
    os.execvpe(arguments[0], arguments, wanted)  # noqa: S606 - the caller's own command


def lock(selectors: _Locked = None, output: _Output = None, modules: _Import = None) -> None:
    """Write down the patches with the versions, verdicts and fingerprints that they have here, as JSON.

    `patches check --lock FILE` then says what has moved since.
    """
    for module in modules or ():
        importlib.import_module(module)
    found = make_lock(*(selectors or ()))
    if output is None:
        typer.echo(json.dumps(found, indent=2, sort_keys=True))
        return
    write(found, output)
    typer.echo(f"locked {', '.join(entry['id'] for entry in found['patches'])} in {output}")


def check_lock(file: Path, selectors: Sequence[str], *, as_json: bool) -> None:
    """Print what differs from a lock, and exit with 1 if anything does."""
    locked = read(file)
    lines = changes(locked, *selectors)
    typer.echo(json.dumps(lines, indent=2) if as_json else "\n".join(lines) or f"everything is as in {file}")
    if lines:
        raise typer.Exit(1)
