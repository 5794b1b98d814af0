"""The order of imports: within a package a file imports only from files before it, and `patches` stands alone."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Rooms of `surgery`, first to last; a module imports from its own room and from earlier ones, in functions and for
#: type checkers too.
ROOMS = (
    "errors",
    "config",
    "telemetry",
    "comm",
    "checkpoint",
    "model",
    "quantizers",
    "sharding",
    "adapters",
    "state",
    "passes",
    "step",
    "origin",
    "planning",
    "bound",
    "writing",
    "recipe",
    "integrations",
    "attestation",
    "tracing",
    "",  # the package itself: its public names
    "run",
    "doctor",
    "finetune",
    "generate",
    "cli",
    "__main__",
)

#: What nobody outside of the rooms of formats and strategies may know.
SEAMS = ("quantizers", "sharding", "config")
STRATEGIES = ("unsharded", "ddp", "fsdp", "fsdp1", "fsdp2")


def modules(package: str) -> dict[str, Path]:
    """Every module of `package` by its dotted name."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(name: str, file: Path, *, inside_functions: bool) -> Iterator[str]:
    """Absolute names of what a module imports, for type checkers too if `inside_functions`."""
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    pending: list[ast.AST] = [ast.parse(file.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not inside_functions:
            pending.extend(node.orelse)
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not inside_functions:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            origin = ".".join(filter(None, (base if node.level else "", node.module)))
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


def resolve(imported: str, known: dict[str, Path]) -> str | None:
    """The module of ours that `imported` is, or is a name in; the package's public names count as the package."""
    if imported in known:
        return imported
    parent = imported.rpartition(".")[0]
    return parent if parent in known else None


@pytest.mark.parametrize("package", ["patches", "surgery"])
def test_no_file_imports_in_a_circle(package: str) -> None:
    known = modules(package)
    graph = {}
    for name, file in known.items():
        found = {resolve(imported, known) for imported in imports(name, file, inside_functions=False)}
        graph[name] = found - {None, name}
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


def room_of(name: str) -> str:
    """The room of `surgery` that a module is in; a command belongs to the command line, wherever its file is."""
    room = "cli" if name.endswith(".command") else name.removeprefix("surgery").strip(".").partition(".")[0]
    assert room in ROOMS, f"{name} is in no room: add it to ROOMS, where its imports allow"
    return room


def imported_rooms() -> Iterator[tuple[str, str]]:
    """`(module, module that it imports)` of `surgery`, for type checkers too."""
    known = modules("surgery")
    for name, file in known.items():
        found = {resolve(imported, known) for imported in imports(name, file, inside_functions=True)}
        yield from ((name, other) for other in found if other is not None and name != "surgery")


def test_every_file_imports_from_its_own_and_earlier_rooms_only() -> None:
    order = {room: number for number, room in enumerate(ROOMS)}
    wrong = [
        f"{name} imports {other}" for name, other in imported_rooms() if order[room_of(other)] > order[room_of(name)]
    ]
    assert wrong == []


def test_no_file_imports_in_a_circle_for_type_checkers_either() -> None:
    graph: dict[str, set[str]] = {}
    for name, other in imported_rooms():
        graph.setdefault(name, set()).update({other} - {name})
    list(graphlib.TopologicalSorter(graph).static_order())


def test_the_core_of_patches_stays_readable() -> None:
    apart = ("builtin", "foreign", "testing")
    core = [file for name, file in modules("patches").items() if name.split(".")[1:2] not in [[room] for room in apart]]
    lines = sum(len(file.read_text().splitlines()) for file in core)
    assert len(core) <= 25
    assert lines <= 6340, "leave as many out as come in"


def test_patches_never_imports_surgery_nor_torch_outside_functions() -> None:
    for name, file in modules("patches").items():
        outside = set(imports(name, file, inside_functions=False))
        assert not [i for i in outside if i.partition(".")[0] in {"torch", "bitsandbytes", "peft", "transformers"}], (
            name
        )
        everywhere = set(imports(name, file, inside_functions=True))
        assert not [i for i in everywhere if i.partition(".")[0] == "surgery"], name


def test_patches_names_itself_nowhere_since_it_may_have_its_second_name() -> None:
    for name, file in modules("patches").items():
        nodes = list(ast.walk(ast.parse(file.read_text())))
        named = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        named += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
        # For type checkers alone, the second name says what it stands for.
        allowed = ["patches"] if name == "patches.model_surgery_patches" else []
        assert [each for each in named if each.partition(".")[0] == "patches"] == allowed, name


def test_surgery_uses_the_public_names_of_patches() -> None:
    import patches

    for name, file in modules("surgery").items():
        for imported in imports(name, file, inside_functions=True):
            root, _, rest = imported.partition(".")
            assert root != "patches", f"{name} imports {imported}, which a file beside a script may shadow"
            assert root != "model_surgery_patches" or rest in ("", *patches.__all__), f"{name} imports {imported}"


def outside_the_seams() -> Iterator[tuple[str, ast.Module]]:
    """The modules of `surgery` that must work with any format and any strategy."""
    for name, file in modules("surgery").items():
        if room_of(name) not in SEAMS:
            yield name, ast.parse(file.read_text())


def test_nobody_asks_which_strategy_it_is() -> None:
    options = {"FSDP1", "FSDP2", "DDP", "Fsdp1", "Fsdp2", "Ddp", "Unsharded", "FSDPModule", "FullyShardedDataParallel"}
    asked = [
        f"{name}: {ast.unparse(node)}"
        for name, tree in outside_the_seams()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass", "type")
        if options & {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    ]
    assert asked == []


def test_nobody_names_a_placement() -> None:
    named = [
        f"{name}, line {node.lineno}: {node.value}"
        for name, tree in outside_the_seams()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in ("sharded", "rank0-cpu", "replicated")
    ]
    assert named == []


def test_nobody_imports_a_concrete_format_or_strategy() -> None:
    concrete = (
        "surgery.quantizers.bnb",
        "surgery.quantizers.none",
        *(f"surgery.sharding.{each}" for each in STRATEGIES),
    )
    wrong = [
        f"{name} imports {other}"
        for name, other in imported_rooms()
        if room_of(name) not in SEAMS and other in concrete
    ]
    assert wrong == []


def test_strategies_do_not_import_each_other() -> None:
    # Of two that are alike, each has its base in common.
    of = {f"surgery.sharding.{each}" for each in ("ddp", "fsdp1", "fsdp2")}
    assert [(name, other) for name, other in imported_rooms() if {name, other} <= of and name != other] == []


def test_few_files_are_smaller_than_an_idea() -> None:
    sizes = {name: len(file.read_text().splitlines()) for name, file in modules("surgery").items()}
    packages = {name for name, file in modules("surgery").items() if file.stem in ("__init__", "__main__")}
    assert len([name for name, size in sizes.items() if size < 40 and name not in packages]) <= 5


def test_importing_patches_imports_no_upstream_library() -> None:
    code = "import sys, patches; print(*{'torch', 'peft', 'typer', 'rich', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
