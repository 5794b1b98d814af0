"""Plain English: the first line of a docstring is a verb or a noun phrase that stands alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Prepositions, conjunctions and relative pronouns: a first line that begins with one needs its subject guessed.
DEPENDENT = """
about above across after against along also although among and around as at because before behind below beneath
beside besides between beyond but by despite during except for from how if in inside into like of on once onto or
outside over per since such than that though through throughout till to toward towards under unless until upon what
whatever when whenever where wherever which whichever while who whoever whom whose why with within without
"""


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """`(line, name, text)` of every docstring: of the module, its classes and functions, and their attributes."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = getattr(node, "name", "the module")
        before: ast.stmt | None = None
        for statement in node.body:
            text = _text(statement)
            if text is not None:
                yield statement.lineno, name if before is None else ast.unparse(before).partition("\n")[0], text
            before = statement


def _text(statement: ast.stmt) -> str | None:
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return statement.value.value if is_text and isinstance(statement.value.value, str) else None


def dependent(tree: ast.Module) -> list[tuple[int, str, str]]:
    """`(line, name, first line)` of every docstring that begins with a word in `DEPENDENT`."""
    words = DEPENDENT.split()
    return [
        (line, name, text.strip().partition("\n")[0])
        for line, name, text in docstrings(tree)
        if (first := re.match(r"[^\w`]*(\w+)(?![\w-])", text)) and first[1].lower() in words
    ]


@pytest.mark.parametrize("package", ["patches", "surgery", "tools"])
def test_first_lines_stand_alone(package: str) -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {name}: {text}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for line, name, text in dependent(ast.parse(file.read_text(encoding="utf-8")))
    ]
    advice = "begin these docstrings with a verb or a noun phrase that stands alone"
    assert not found, "\n".join([f"{len(found)} in {package}; {advice}:", *found])


def test_dependent_first_lines_are_found() -> None:
    source = '''"""Module docstring."""

class Rank:
    """Of the rank with most."""

    peak: int
    """`in` for members; on-disk bytes."""
    nodes: int
    """On-node ranks."""
    ranks: int
    """(In) the world."""

    def check(self) -> None:
        """
        What has come of it.
        """
'''
    found = dependent(ast.parse(source))
    assert found == [
        (4, "Rank", "Of the rank with most."),
        (11, "ranks: int", "(In) the world."),
        (14, "check", "What has come of it."),
    ]
