"""The command line: parse, ask the package, render."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import keyword
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Annotated, Any, Final

import typer

from .audit import aliases as find_aliases
from .audit import audit as take_audit
from .drift import NoSourceError, fingerprint
from .errors import PatchError, TargetError, UnknownPatchError
from .foreign import changed_files, foreign
from .forms import is_traced
from .journal import read_journals
from .ledger import aligned
from .manifest import changes, read
from .manifest import lock as make_lock
from .manifest import write as write_lock
from .patch import Patch
from .plan import Verdict, VerdictKind, fingerprint_of, resolve, verdict
from .plan import plan as make_plan
from .registry import BUNDLES, ENTRY_POINT_GROUP, REGISTRY, is_pattern, select
from .run import command as command_of
from .run import environment, offer
from .target import MISSING, Kind, Place, describe, locate, parse

__all__ = ["app", "main"]

_UNTRUSTED: Final = (VerdictKind.UNKNOWN, VerdictKind.INCOMPATIBLE)
_TEMPLATES: Final = Path(__file__).with_name("templates")
_WRAPPED: Final = (Kind.FUNCTION, Kind.METHOD, Kind.CLASSMETHOD, Kind.STATICMETHOD, Kind.PROPERTY)

app = typer.Typer(
    name="patches",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",  # joins the lines of a paragraph, for terminals of any width
    help="Reversible patches for libraries that you cannot change.\n\n"
    "Start with `patches list`, read one with `patches show ID`, and ask with `patches check` which of them "
    "the installed versions need. Apply them in Python with `patches.transaction(ID)`, or to a whole program with "
    "`patches run`.",
)


def _import(modules: Sequence[str], option: str = "--import") -> None:
    """Import the modules that an option names, those in the current folder too, as `python -m` does.

    The entry points of a project there are found, though it is not installed.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    offer(here)
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise typer.BadParameter(f"{module!r} cannot be imported: {error}", param_hint=option) from error


_SELECTORS_HELP: Final = "An id, a bundle, `tag:word`, or a glob such as `torch.*`."
_Selectors = Annotated[
    list[str] | None, typer.Argument(metavar="SELECTOR", help=f"{_SELECTORS_HELP} Every known patch if none is given.")
]
_Planned = Annotated[list[str], typer.Argument(metavar="SELECTOR", help=_SELECTORS_HELP)]
_Fingerprint = Annotated[
    bool, typer.Option("--fingerprint", metavar="", help="Print the fingerprint of the target's source only.")
]
_Force = Annotated[bool, typer.Option("--force", metavar="", help="As `transaction(force=True)`: obsolete ones too.")]
_Id = Annotated[str, typer.Argument(metavar="ID", help="As `patches list` shows it.")]
_Patch = Annotated[str, typer.Argument(metavar="ID|TARGET", help="A patch, or `package.module:name`.")]
_AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON instead of a table.")]
_Import = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        callback=lambda modules: _import(modules or ()),
        is_eager=True,
        help="Import this first, for what it registers or applies. Repeatable.",
    ),
]
_Lock = Annotated[
    Path | None,
    typer.Option("--lock", metavar="FILE", help="Say what differs from this file, which `patches lock` wrote."),
]
_Command = Annotated[
    list[str] | None,
    typer.Argument(metavar="COMMAND", help="After `--`: `script.py ...`, `-m module ...`, or a program."),
]
_Apply = Annotated[
    list[str] | None,
    typer.Option("--apply", metavar="IDS", help="What to apply: ids, bundles or selectors, separated by commas."),
]
_RunImport = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Import this first, in every process. Repeatable."),
]
_Locked = Annotated[
    list[str] | None,
    typer.Argument(metavar="SELECTOR", help=f"{_SELECTORS_HELP} If none, what `--import` has applied."),
]
_Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Written whole or not at all.")]
_All = Annotated[bool, typer.Option("--all", metavar="", help="Also what was reverted or skipped.")]
_Journal = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Show every process that ran with PATCHES_JOURNAL=DIR, and which of them differ."),
]
_Foreign = Annotated[
    list[str] | None,
    typer.Option("--foreign", metavar="PACKAGE", help="Show what others have patched in this package. Repeatable."),
]
_Disk = Annotated[bool, typer.Option("--disk", metavar="", help="With --foreign: compare files with their RECORD too.")]
_Package = Annotated[str, typer.Argument(metavar="PACKAGE", help="Where the patch goes, such as `my_project.patches`.")]
_NewId = Annotated[str, typer.Option("--id", metavar="ID", help="`upstream.kebab-name`; the module is named after it.")]
_Target = Annotated[str, typer.Option("--target", metavar="TARGET", help="`package.module:Class.attribute`.")]
_Reason = Annotated[str, typer.Option(metavar="TEXT", help="The defect, in a sentence.")]
_Upstream = Annotated[str, typer.Option(metavar="URL", help="The report, or the source that shows the defect.")]
_Root = Annotated[Path, typer.Option(metavar="DIR", help="What packages are found in: the project, or its `src`.")]
_Tests = Annotated[Path, typer.Option(metavar="DIR", help="Where the tests go, below the root unless absolute.")]


def _say_version(*, wanted: bool) -> None:
    if wanted:
        typer.echo(f"patches {version('model-surgery-patches')}")
        raise typer.Exit


_Version = Annotated[bool, typer.Option("--version", metavar="", callback=_say_version, is_eager=True, help="Show it.")]


@app.callback()
def _root(_: _Version = False) -> None: ...


@app.command("list")
def list_patches(_: _Import = None, as_json: _AsJson = False) -> None:
    """List every known patch and its source, and the names of the bundles. Imports none of them."""
    _print([{"id": patch_id, "source": REGISTRY.source(patch_id)} for patch_id in REGISTRY.ids()], as_json=as_json)
    if not as_json:
        typer.echo(f"\nbundles: {', '.join(BUNDLES.names())}")


@app.command()
def show(patch_id: _Id, _: _Import = None, as_json: _AsJson = False, only_fingerprint: _Fingerprint = False) -> None:
    """Show everything about one patch, its verdict included. Imports the library that it patches.

    With --fingerprint, print the fingerprint of the installed upstream source, to use in the patch's declaration.
    """
    patch = REGISTRY.get(patch_id)
    if only_fingerprint:
        typer.echo(fingerprint_of(patch))
        return
    found = verdict(patch)
    declared = {field.name: getattr(patch, field.name) for field in fields(patch) if field.init}
    declared["target"] = " or ".join(map(str, patch.targets))
    given = {name: _plain(value) for name, value in declared.items() if value is not MISSING}
    facts = {**given, "verdict": str(found), "why": found.why, **_under_compile(patch, found)}
    if as_json:
        typer.echo(json.dumps(facts, indent=2, default=str))
    else:
        _print([{"field": name, "value": _text(value)} for name, value in facts.items() if value], as_json=False)


@app.command()
def check(selectors: _Selectors = None, _: _Import = None, as_json: _AsJson = False, lock_file: _Lock = None) -> None:
    """Report for each patch whether the installed versions need it.

    A patch without an entry point is known once its module is imported: `--import my_project.patches`.

    - needed: the defect is present.
    - obsolete: it is absent; a transaction skips the patch.
    - absent: a library that the patch `requires` is not installed.
    - unknown: the versions are outside the window, the source or the signature of the target has changed, somebody
      else has patched it, or the probe raised.
    - incompatible: the target does not exist.

    Exits with 1 if a patch is unknown or incompatible; with --lock, if anything differs from the file.
    """
    if lock_file is not None:
        lines = changes(read(lock_file), *(selectors or ()))
        typer.echo(json.dumps(lines, indent=2) if as_json else "\n".join(lines) or f"everything is as in {lock_file}")
        raise typer.Exit(1 if lines else 0)
    verdicts = {patch_id: verdict(patch_id) for patch_id in (select(*selectors) if selectors else REGISTRY.ids())}
    rows: list[dict[str, Any]] = []
    for patch_id, found in verdicts.items():
        rows.append({"id": patch_id, "verdict": str(found), "why": found.why})
        if as_json:
            compiled = _under_compile(REGISTRY.get(patch_id), found)
            rows[-1] |= {"since": found.since, "drift": found.drift, "foreign": found.foreign, **compiled}
    _print(rows, as_json=as_json)
    if any(found.kind in _UNTRUSTED for found in verdicts.values()):
        raise typer.Exit(1)


@app.command()
def audit(
    _: _Import = None,
    as_json: _AsJson = False,
    everything: _All = False,
    journal: _Journal = None,
    foreign_packages: _Foreign = None,
    disk: _Disk = False,
) -> None:
    """Show the patches of this process: target, scope, time, caller, reason, and state.

    A new process has no patches, so name a module that applies some: `patches audit --import mypackage`.

    With --journal, show the processes that kept a journal side by side instead, and exit with 1 if they differ, or
    a patch has failed. With --foreign, show what code other than this package has patched, compared with a clean
    process.
    """
    if disk and not foreign_packages:
        raise typer.BadParameter("it needs --foreign PACKAGE, which says whose files to compare", param_hint="--disk")
    if journal is not None:
        processes = read_journals(journal)
        typer.echo(processes.to_json() if as_json else str(processes))
        raise typer.Exit(1 if processes.differences or processes.failures else 0)
    if foreign_packages:
        _show_foreign(foreign_packages, as_json=as_json, disk=disk)
    else:
        found = take_audit(include_reverted=everything)
        typer.echo(found.to_json() if as_json else str(found))


@app.command()
def aliases(patch: _Patch, _: _Import = None, as_json: _AsJson = False) -> None:
    """List the copies of a target in other modules, such as `from x import f` makes.

    A patch does not reach a copy that holds the original, unless declared with aliases="rewrite".
    """
    try:
        found = [asdict(alias) for alias in find_aliases(patch)]
    except UnknownPatchError as error:
        colon = f"a target has a colon, such as {':'.join(patch.rsplit('.', 1))}"
        raise UnknownPatchError(f"{error}; {colon}", patch_id=error.patch_id) from error
    if as_json or found:
        _print(found, as_json=as_json)
    else:
        typer.echo("no copy in any module that is loaded")


@app.command()
def plan(selectors: _Planned, _: _Import = None, force: _Force = False) -> None:
    """Show which patches a transaction would apply, in which order, and why. Changes nothing.

    Includes the patches that others need. Exits with 2 if the transaction would be refused, and prints the reason.
    """
    typer.echo(make_plan(*selectors, force=force).explain())


@app.command()
def new(
    package: _Package,
    patch_id: _NewId,
    target: _Target,
    _: _Import = None,
    reason: _Reason = "",
    upstream: _Upstream = "",
    root: _Root = Path(),
    tests: _Tests = Path("tests"),
) -> None:
    """Write a new patch and its tests, tied to the installed version and source of the target.

    The tests pass as written. Comments number what remains: the probe, which tries for the defect; the verification
    of the effect; the wrapper, which has it; and a test.
    """
    sys.path.insert(0, str(root.resolve()))  # the target may be in the project itself
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in package.split(".")):
        raise PatchError(f"expected a package such as 'my_project.patches', got {package!r}")
    top = package.partition(".")[0]
    hidden = None if (root / top).exists() else importlib.util.find_spec(top)
    if hidden is not None:
        which = f"which would hide that in {hidden.origin}; choose another, or name its project with --root"
        raise PatchError(f"expected a package of your own, got {top!r}, {which}")
    facts, reason = _facts(target, _quotable(upstream)), _quotable(reason or "say what goes wrong without it")
    Patch(id=patch_id, target=target, wrapper=lambda *_: None, reason=reason)  # refuses a bad id
    name, folder = _identifier(patch_id), Path(*package.split("."))
    words = {**facts, "id": patch_id, "target": target, "reason": reason, "module": f"{package}.{name}"}
    texts = {
        part: Template((_TEMPLATES / f"{part}.txt").read_text(encoding="utf-8")).substitute(words, function=name)
        for part in ("patch", "tests")
    }
    files = {root / folder / f"{name}.py": texts["patch"], root / tests / f"test_{name}.py": texts["tests"]}
    taken = next(filter(Path.exists, files), None)
    if taken is not None:
        raise PatchError(f"{taken} exists; expected a new file: choose another id, package or folder")
    packages = [root / parent / "__init__.py" for parent in [folder, *folder.parents][:-1]]
    for path, text in ({path: "" for path in packages if not path.exists()} | files).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        typer.echo(f"wrote {path}")
    entry_point = f'[project.entry-points."{ENTRY_POINT_GROUP}"]\n"{patch_id}" = "{words["module"]}"'
    typer.echo(f"\nNow add to pyproject.toml, so that others find it by its id:\n\n{entry_point}\n")
    typer.echo(f"and run: python -m pytest {root / tests / f'test_{name}.py'}")


def _facts(target: str, upstream: str) -> dict[str, str]:
    """The facts of a target for the templates, as installed. Raises TargetError if no wrapper can be there."""
    parsed = parse(target)
    place = describe(parsed, locate(parsed))
    if place.kind not in _WRAPPED:
        why = f"its kind is {place.kind.value!r}, and the template is for what is called or read"
        raise TargetError(f"no patch was made for {target!r}: {why}", target=target, why=why)
    return {
        "owner": ":".join(filter(None, (parsed.module, ".".join(parsed.owner_path)))),
        "attribute": parsed.name,
        "known": "".join(f"    {line}\n" for line in _known(place, upstream)),
    }


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


def _quotable(text: str) -> str:
    """The text as one line that fits in a string literal and in a docstring."""
    return " ".join(text.split()).replace("\\", "\\\\").replace('"', "'")


@app.command(context_settings={"allow_interspersed_args": False})
def run(command: _Command = None, apply: _Apply = None, modules: _RunImport = None) -> None:
    """Run a script, a module or a program, and every Python process that it starts, with patches.

    Each patch is applied when its target is imported. Without a command, print the environment that does it, for
    `eval "$(patches run --apply IDS)"` in a shell. Exits with 2 if an id is unknown; otherwise this process becomes the
    command.
    """
    selectors = [word.strip() for words in apply or () for word in words.split(",") if word.strip()]
    wanted = environment(*selectors, imports=modules or ())
    if not command:
        added = {name: value for name, value in wanted.items() if value != os.environ.get(name)}
        typer.echo("\n".join(f"export {name}={shlex.quote(value)}" for name, value in added.items()))
        return
    arguments = command_of(command)
    sys.stdout.flush()
    os.execvpe(arguments[0], arguments, wanted)  # noqa: S606 - the caller's own command


@app.command()
def lock(selectors: _Locked = None, output: _Output = None, _: _Import = None) -> None:
    """Write down the patches with the versions, verdicts and fingerprints that they have here, as JSON.

    `patches check --lock FILE` then says what has moved since.
    """
    found = make_lock(*(selectors or ()))
    if output is None:
        typer.echo(json.dumps(found, indent=2, sort_keys=True))
        return
    write_lock(found, output)
    typer.echo(f"locked {', '.join(entry['id'] for entry in found['patches'])} in {output}")


def main() -> None:
    """Run the console script. Errors of this package are printed without a traceback, with exit code 2."""
    try:
        app()
    except PatchError as error:
        typer.echo(f"patches: {error}", err=True)
        if isinstance(error, UnknownPatchError) and error.patch_id not in REGISTRY.ids():
            declare = "" if is_pattern(error.patch_id) else "declare it in an entry point, or "
            typer.echo(f"If it is yours, {declare}name the module that registers it with --import MODULE.", err=True)
        sys.exit(2)


def _show_foreign(packages: list[str], *, as_json: bool, disk: bool) -> None:
    _import(packages, option="--foreign")
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


def _under_compile(patch: Patch, found: Verdict) -> dict[str, str]:
    if found.kind in (VerdictKind.ABSENT, VerdictKind.INCOMPATIBLE):
        return {}
    try:
        seen = is_traced(resolve(patch))
    except TargetError:  # an obsolete patch, whose target this release does not have
        return {}
    return {"torch.compile": "traced" if seen else "not seen: a compiled region runs the stock code of its target"}


def _plain(value: object) -> object:
    """A field's value as JSON can hold it; functions by name."""
    if callable(value):
        return f"{getattr(value, '__module__', '?')}:{getattr(value, '__qualname__', repr(value))}"
    return dict(value) if isinstance(value, Mapping) else value


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _print(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif rows:
        typer.echo(_table(tuple(rows[0]), [tuple(row.values()) for row in rows]))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; where it is too wide for the terminal, the last column is wrapped, below the others if they are wide."""
    table = aligned(header, rows)
    width = shutil.get_terminal_size((sys.maxsize, 0)).columns  # a pipe has no width
    if max(map(len, table.splitlines())) <= width:
        return table
    firsts = aligned(header[:-1], [row[:-1] for row in rows]).splitlines()
    start = max(map(len, firsts)) + 2
    indent = start if start <= width // 2 else 4
    wrap = textwrap.TextWrapper(width=max(width - indent, 1), break_long_words=False, break_on_hyphens=False)
    lines = []
    for first, row in zip(firsts, (header, *rows), strict=True):
        last = f"\n{' ' * indent}".join(wrap.wrap(row[-1]))
        lines.append(f"{first:{start}}{last}" if indent == start else f"{first}\n{' ' * indent}{last}")
    return "\n".join(lines)
