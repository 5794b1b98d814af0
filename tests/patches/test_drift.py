"""Fingerprints, signatures, and patches of others that were there before."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import wrapt
from typer.testing import CliRunner

import patches
from patches.cli import app
from patches.drift import parse_signature, same_parameters
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import functions, values
from tests.helpers.snapshot import Snapshot

SCALE = f"{FUNCTIONS}:scale"

pytestmark = pytest.mark.usefixtures("unchanged")
numbers = itertools.count()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Makes an upstream module of a text."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(text: str) -> ModuleType:
        name = f"upstream_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    return make


def around(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def foreign(*args: Any, **kwargs: Any) -> Any:
        return stock(*args, **kwargs)

    return foreign


def fingerprint(module: ModuleType, path: str = "f", **fields: Any) -> str:
    return patches.fingerprint_of(declare("x", f"{module.__name__}:{path}", **fields))


PLAIN = "def f(x, y=1):\n    return [x, y]\n"


@pytest.mark.parametrize(
    "text",
    [
        'def f(x, y=1):\n    """Docs."""\n    return [x, y]\n',
        "def f(x,  # an argument\n      y = 1,\n):\n\n    # a comment\n    return [\n        x, y ]\n",
        "\n\n\nimport os\n\ndef f(x, y=1): return [x, y]\n",
        "if True:\n    def f(x, y=1):\n        return [x, y]\n",
    ],
)
def test_comments_and_formatting_do_not_matter(text: str, write: Callable[[str], ModuleType]) -> None:
    assert fingerprint(write(text)) == fingerprint(write(PLAIN))


@pytest.mark.parametrize(
    "text",
    [
        "def f(x, y=2):\n    return [x, y]\n",
        "def f(x, y=1):\n    return [y, x]\n",
        "def f(x, y=1):\n    x += 1\n    return [x, y]\n",
        "def f(x, y=1):\n    return ['x', y]\n",
        "async def f(x, y=1):\n    return [x, y]\n",
        "import functools\n@functools.cache\ndef f(x, y=1):\n    return [x, y]\n",
    ],
)
def test_code_does(text: str, write: Callable[[str], ModuleType]) -> None:
    assert fingerprint(write(text)) != fingerprint(write(PLAIN))


def test_it_does_not_depend_on_the_version_of_python(write: Callable[[str], ModuleType]) -> None:
    """As found with 3.11; a field that a later `ast` adds must not change it."""
    assert fingerprint(write(PLAIN)) == "584571e3cc2fe88c"


CLASS = '''
class C:
    """Docs."""

    limit = 3

    def method(self, x):
        text = """a
string at the margin"""
        return x, text

    @classmethod
    def build(cls):
        return cls()

    @property
    def size(self):
        return 7
'''


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("C.method", {}),
        ("C.build", {}),
        ("C.size", {}),
        ("C.limit", {"kind": "value"}),
        ("C", {"kind": "class"}),
        ("C.stored", {"kind": "attribute"}),
    ],
)
def test_every_kind_has_one_and_a_wrapper_in_place_does_not_hide_it(
    path: str, fields: dict[str, Any], write: Callable[[str], ModuleType]
) -> None:
    module = write(CLASS)
    before = fingerprint(module, path, **fields)
    assert fingerprint(write(f"# moved\n{CLASS}"), path, **fields) == before
    target = f"{module.__name__}:{path}"
    wrapper = (lambda read, *_: type("D", (read(),), {})) if path == "C" else declare("x", target).wrapper
    with patches.transaction(declare("a", target, wrapper=wrapper, **fields), reason="a test"):
        assert fingerprint(module, path, **fields) == before


@pytest.mark.parametrize("how", ["wraps", "wrapt", "partial"])
def test_a_wrapper_of_somebody_else_does_not_hide_it(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, before = functions.scale, fingerprint(functions, "scale")
    foreign = {
        "wraps": around(stock),
        "wrapt": wrapt.FunctionWrapper(stock, declare("x", SCALE).wrapper),
        "partial": functools.partial(stock, by=3),
    }
    monkeypatch.setattr(functions, "scale", foreign[how])
    assert fingerprint(functions, "scale") == before


@pytest.mark.parametrize("path", ["floor", "missing"])
def test_what_has_no_source_has_no_fingerprint(path: str) -> None:
    with pytest.raises(patches.TargetError, match=r"has no fingerprint|no attribute"):
        fingerprint(functions, path)


def right() -> str:
    return fingerprint(functions, "scale")


def test_a_fingerprint_that_matches_makes_a_version_outside_the_window_good() -> None:
    outside = {"requires": {"wrapt": "<1"}}
    assert patches.verdict(declare("a", SCALE, **outside)).kind == "unknown"
    for probe in (None, lambda: True):
        found = patches.verdict(declare("a", SCALE, fingerprint=("0" * 16, right()), probe=probe, **outside))
        assert found.kind == "needed"
        assert "is not in <1; the source is the one" in found.why


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"fingerprint": "0" * 16}, "its source has changed: the fingerprint is [0-9a-f]{16}, expected 0{16}"),
        ({"signature": "(x, *, factor=2)"}, r"its signature has changed: it is \(x: 'int', \*, by: 'int' = 2\)"),
        ({"signature": "(x, by=2)"}, "its signature has changed"),
        ({"signature": "(x, *, by)"}, "its signature has changed"),
        ({"target": f"{FUNCTIONS}:floor", "fingerprint": "0" * 16}, "cannot be compared: .*floor.* is no Python"),
    ],
)
def test_drift_is_refused_warned_about_or_skipped_as_the_patch_says(
    fields: dict[str, Any], why: str, unchanged: Snapshot
) -> None:
    target = fields.get("target", SCALE)
    declared = {name: value for name, value in fields.items() if name != "target"}
    found = patches.verdict(declare("a", target, **declared))
    assert found.kind == "unknown"
    assert len(found.drift) == 1
    with pytest.raises(patches.DriftError, match=why) as caught:
        patches.transaction(declare("a", target, **declared), reason="a test").__enter__()
    assert caught.value.patch_id == "fake.a"
    assert unchanged.differences() == []

    warns = declare("a", target, **declared, on_drift="warn")
    with pytest.warns(patches.DriftWarning, match=why) as warned, patches.transaction(warns, reason="a test") as tx:
        assert len(tx.receipts) == 1
    assert [Path(warning.filename).name for warning in warned] == ["test_drift.py"]

    skips = declare("a", target, **declared, on_drift="skip")
    with patches.transaction(skips, reason="a test") as tx:
        assert tx.receipts == []
        assert [receipt.id for receipt in tx.skipped] == ["fake.a"]
    with patches.transaction(declare("a", target, **declared), reason="a test", force=True) as tx:
        assert len(tx.receipts) == 1


def test_a_patch_that_is_not_needed_is_obsolete_whatever_its_source() -> None:
    assert patches.verdict(declare("a", SCALE, fingerprint="0" * 16, probe=lambda: False)).kind == "obsolete"


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("()", lambda: None),
        ("(a, /, b, c=1, *rest, d, e=2, **more)", lambda a, /, b, c=9, *rest, d, e=8, **more: None),
        ("(a: int = 3) -> str", lambda a=None: None),
        ("(a=undefined)", lambda a=1: None),
    ],
)
def test_signatures_are_compared_by_shape(text: str, function: Callable[..., None]) -> None:
    assert same_parameters(parse_signature(text), inspect.signature(function))
    assert not same_parameters(parse_signature("(other)"), inspect.signature(function))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("signature", "x, y"),
        ("signature", "(x"),
        ("signature", "(x): pass\ndef g()"),
        ("fingerprint", "abc"),
        ("on_drift", "allow"),
        ("on_foreign", "ignore"),
        ("tags", "speed"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: str) -> None:
    with pytest.raises(patches.DefinitionError) as caught:
        declare("a", SCALE, **{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("window", "since"),
    [
        (">=0.7,<0.12", "wrapt 0.12"),
        ("<=0.11.1", "a version after wrapt 0.11.1"),
        (">=999", ""),
        (">=1", ""),
    ],
)
def test_obsolete_says_since_when(window: str, since: str) -> None:
    found = patches.verdict(declare("a", SCALE, requires={"wrapt": window}, probe=lambda: False))
    assert (found.kind, found.since) == ("obsolete", since)
    assert not since or f"absent since {since}" in found.why


def replacements() -> dict[str, Any]:
    stock = functions.scale
    return {
        "closure": lambda x, by=2: stock(x, by=by) + 0,
        "wraps": around(stock),
        "wrapt": wrapt.FunctionWrapper(stock, declare("x", SCALE).wrapper),
        "partial": functools.partial(stock),
        "mock": mock.MagicMock(wraps=stock),
        "builtin": len,
    }


@pytest.mark.parametrize("how", ["closure", "wraps", "wrapt", "partial", "mock", "builtin"])
def test_somebody_elses_patch_is_noticed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setattr(functions, "scale", replacements()[how])
        found = patches.verdict(declare("a", SCALE, on_foreign="error"))
        assert found.kind == "unknown"
        assert "somebody else has patched it already" in found.why
        if how in ("closure", "wraps", "wrapt"):
            assert f"{Path(__file__).name}:" in found.why or "declare.py:" in found.why
        with pytest.raises(patches.DriftError, match="somebody else"):
            patches.plan(declare("a", SCALE, on_foreign="error"))
        with pytest.warns(patches.DriftWarning, match="somebody else"):
            patches.plan(declare("a", SCALE, on_foreign="warn"))
        assert patches.plan(declare("a", SCALE, on_foreign="skip")).steps == ()
        assert len(patches.plan(declare("a", SCALE)).steps) == 1
    assert patches.verdict(declare("a", SCALE, on_foreign="error")).kind == "needed"


DECORATED = """
import contextlib, functools, wrapt

def loud(f):
    @functools.wraps(f)
    def inner(*args): return f(*args)
    return inner

def silent(f):
    return lambda *args: f(*args)

@loud
def once(x): return x

@loud
@loud
def twice(x): return x

@silent
def hidden(x): return x

@contextlib.contextmanager
def context(x): yield x

@wrapt.decorator
def decorating(wrapped, instance, args, kwargs): return wrapped(*args)

@decorating
def through_wrapt(x): return x

cached = functools.partial(once, 1)
if True:
    def branch(x): return x
else:
    def branch(x): return -x
from math import floor
from textwrap import indent

class C:
    @functools.cache
    def cached(self): return 1
    @property
    def size(self): return 1
    @size.setter
    def size(self, value): pass
    @staticmethod
    @loud
    def static(x): return x
    alias = size
"""

PATHS = ["once", "twice", "hidden", "context", "through_wrapt", "cached", "branch", "floor", "indent"]


@pytest.mark.parametrize("path", [*PATHS, "C.cached", "C.size", "C.static", "C.alias"])
def test_what_upstream_itself_has_put_around_is_its_own(path: str, write: Callable[[str], ModuleType]) -> None:
    target = f"{write(DECORATED).__name__}:{path}"
    found = patches.verdict(declare("a", target, on_foreign="error"))
    assert found.foreign == ()


@pytest.mark.parametrize("path", ["once", "branch", "C.static"])
def test_one_more_wrapper_than_upstream_has_is_foreign(path: str, write: Callable[[str], ModuleType]) -> None:
    module = write(DECORATED)
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, module)
    setattr(owner, name, around(getattr(owner, name)))
    assert patches.verdict(declare("a", f"{module.__name__}:{path}", on_foreign="error")).foreign


def test_a_method_that_upstream_does_not_have_is_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values.Options, "added", lambda self: 1, raising=False)
    assert patches.verdict(declare("a", f"{values.__name__}:Options.added", on_foreign="error")).foreign


def test_our_own_patches_are_not_foreign() -> None:
    with patches.transaction(declare("a", SCALE), reason="a test"):
        assert patches.verdict(declare("b", SCALE, on_foreign="error")).foreign == ()
        assert patches.verdict(declare("b", f"{LAYERS}:Derived.forward", on_foreign="error")).foreign == ()


def test_the_command_line_shows_all_of_it(write: Callable[[str], ModuleType]) -> None:
    module = write(PLAIN)
    patches.register(declare("drift-cli", f"{module.__name__}:f", fingerprint="0" * 16, signature="(x, y=1)"))
    patches.register(declare("drift-cli-gone", SCALE, requires={"wrapt": "<1"}, probe=lambda: False))
    patches.bundle("drift-cli", ["fake.drift-cli*"])
    printed = CliRunner().invoke(app, ["show", "--fingerprint", "fake.drift-cli"])
    assert printed.stdout.strip() == fingerprint(module)
    checked = CliRunner().invoke(app, ["check", "drift-cli", "--json"])
    assert checked.exit_code == 1
    rows = {row["id"]: row for row in json.loads(checked.stdout)}
    assert rows["fake.drift-cli"]["verdict"] == "unknown"
    assert "its source has changed" in rows["fake.drift-cli"]["drift"][0]
    assert rows["fake.drift-cli-gone"]["since"] == "wrapt 1"
    planned = CliRunner().invoke(app, ["plan", "fake.drift-cli-gone"])
    assert planned.exit_code == 0
    assert planned.stdout.splitlines()[1].split()[:2] == ["skip", "fake.drift-cli-gone"]
    sys.modules.pop(module.__name__)
