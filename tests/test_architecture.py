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

#: Layers of `surgery`, first to last; a module imports from its own layer and from earlier ones.
LAYERS = (
    ("errors", "fqn", "converted", "numerals", "twin", "whole"),
    ("config", "match", "walk", "placement", "measurements", "sampling", "report", "pretrained"),
    ("folder_lock", "model_card", "place", "tokenizer_files"),
    ("checkpoint",),
    ("slices", "keys", "defaults", "ties", "weights", "quantizers", "targets", "parts"),
    ("landing", "distributed", "loading", "initials"),
    ("guards", "lifetime", "attestation", "passes", "install", "base_model", "adapter_folder", "adapter_keys"),
    ("adapters", "agreed"),
    ("adapter_options", "adapter_names", "rehearsal"),
    ("filling",),
    ("planning",),
    ("recipe",),
    ("tracing", "reservation"),
    ("",),  # the package itself: its public names
    ("finetune",),
    ("integrations", "cli", "__main__"),
)


def modules(package: str) -> dict[str, Path]:
    """Every module of `package` by its dotted name."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(name: str, file: Path, *, inside_functions: bool) -> Iterator[str]:
    """Absolute names of what a module imports; what only type checkers see is left out."""
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    pending: list[ast.AST] = [ast.parse(file.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
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


def layer_of(name: str) -> int:
    """The number of the layer that a module of `surgery` is in."""
    # A command is a part of the command line, wherever its file is.
    part = "cli" if name.endswith(".command") else name.removeprefix("surgery").strip(".").partition(".")[0]
    found = [number for number, layer in enumerate(LAYERS) if part in layer]
    assert found, f"{name} is in no layer: add it to LAYERS, where its imports allow"
    return found[0]


def test_every_file_imports_from_earlier_layers_only() -> None:
    known = modules("surgery")
    wrong = [
        f"{name} imports {found}"
        for name, file in known.items()
        if name != "surgery"
        for imported in imports(name, file, inside_functions=True)
        if (found := resolve(imported, known)) and layer_of(found) > layer_of(name)
    ]
    assert wrong == []


def test_patches_never_imports_surgery_nor_torch_outside_functions() -> None:
    for name, file in modules("patches").items():
        outside = set(imports(name, file, inside_functions=False))
        assert not [i for i in outside if i.partition(".")[0] in {"torch", "bitsandbytes", "peft", "transformers"}], (
            name
        )
        everywhere = set(imports(name, file, inside_functions=True))
        assert not [i for i in everywhere if i.partition(".")[0] == "surgery"], name


def test_surgery_uses_the_public_names_of_patches() -> None:
    import patches

    for name, file in modules("surgery").items():
        for imported in imports(name, file, inside_functions=True):
            root, _, rest = imported.partition(".")
            assert root != "patches" or rest in ("", *patches.__all__), f"{name} imports {imported}"


def test_sharding_back_ends_do_not_import_each_other() -> None:
    known = modules("surgery.distributed".replace(".", "/"))
    back_ends = {name for name in known if name.rpartition(".")[2].startswith("fsdp")}
    for name in back_ends:
        found = {resolve(i, known) for i in imports(name, known[name], inside_functions=True)}
        assert not (found & back_ends) - {name}


def test_importing_patches_imports_no_upstream_library() -> None:
    code = "import sys, patches; print(*{'torch', 'peft', 'typer', 'rich', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
