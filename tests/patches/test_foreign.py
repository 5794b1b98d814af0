from __future__ import annotations

import builtins
import functools
import importlib
import json
import math
import os
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import wrapt
from typer.testing import CliRunner

import patches
from patches.cli import app
from patches.foreign.compare import Foreign
from tests.helpers.declare import declare
from tests.helpers.victim import forget, make, write

HERE = __file__


def foreign_function(*args: Any) -> Any:
    return args


def around(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs)


class Replacement:
    def forward(self, x: int) -> int:
        return x


class Masked:
    def forward(self, x: int) -> int:
        return x + 1


class CallableObject:
    def __call__(self, *args: Any) -> Any:
        return args


def line_of(value: Any) -> str:
    return f"{HERE}:{value.__code__.co_firstlineno}"


def line_in(text: str) -> str:
    """Where this file has the only line with this text."""
    source = Path(HERE).read_text().splitlines()
    lines = [number for number, line in enumerate(source, 1) if text in line and "line_in" not in line]
    assert len(lines) == 1, text
    return f"{HERE}:{lines[0]}"


def plant(victim: ModuleType) -> None:
    functions, layers = victim.functions, victim.layers
    layer = layers.Layer
    functions.plain = foreign_function
    functions.decorated = around(functions.decorated)
    functions.guarded = lambda x: x  # planted lambda
    functions.bound = functools.partial(foreign_function, 1)
    functions.mocked = mock.MagicMock()
    functions.cached = functools.lru_cache(foreign_function)
    functions.floor = math.ceil
    functions.emptied = None
    functions.recoded.__code__ = foreign_function.__code__
    functions.scale.__defaults__ = (5,)
    del functions.gone
    functions.REGISTRY["gelu"] = foreign_function
    functions._lazy = foreign_function
    functions.added = foreign_function
    layer.forward = foreign_function
    layer.backward = layers.Other.forward
    layer.extra = CallableObject()
    layer.__call__ = wrapt.FunctionWrapper(layer.__call__, wrapper)
    layer.__init__ = around(layer.__init__)
    layer.build = classmethod(foreign_function)
    layer.add = staticmethod(foreign_function)
    layer.size = property(foreign_function)
    layer.weight = layer.weight.setter(foreign_function)
    layer.slow = functools.cached_property(foreign_function)
    layer.Inner.step = foreign_function
    layer.added = foreign_function
    layers.Norm = Replacement
    Masked.__module__, Masked.__qualname__ = layers.__name__, "Masked"
    layers.Masked = Masked
    victim.join = foreign_function
    victim.layers.functools = types.ModuleType("faketools")


def expected() -> dict[str, tuple[str, str, str]]:
    """Target -> kind, how, and where the outermost foreign code is."""
    here = line_of(foreign_function)
    closure = line_of(around(foreign_function))
    replacement = line_of(Replacement.forward)
    return {
        "victim.functions:plain": ("function", "function", here),
        "victim.functions:decorated": ("function", "wraps", closure),
        "victim.functions:guarded": ("function", "lambda", line_in("planted lambda")),
        "victim.functions:bound": ("function", "partial", here),
        "victim.functions:mocked": ("function", "mock", mock.__file__),
        "victim.functions:cached": ("function", "function", here),
        "victim.functions:floor": ("builtin", "builtin", "math"),
        "victim.functions:emptied": ("function", "value", ""),
        "victim.functions:recoded": ("function", "function", here),
        "victim.functions:scale": ("function", "defaults", "victim/functions.py"),
        "victim.functions:gone": ("function", "removed", ""),
        "victim.functions:REGISTRY['gelu']": ("item", "function", here),
        "victim.functions:_lazy": ("attribute", "function", here),
        "victim.functions:added": ("attribute", "function", here),
        "victim.layers:Layer.forward": ("method", "function", here),
        "victim.layers:Layer.backward": ("method", "moved", "victim/layers.py"),
        "victim.layers:Layer.extra": ("method", "object", line_of(CallableObject.__call__)),
        "victim.layers:Layer.__call__": ("method", "wrapt", line_of(wrapper)),
        "victim.layers:Layer.__init__": ("method", "wraps", closure),
        "victim.layers:Layer.build": ("classmethod", "function", here),
        "victim.layers:Layer.add": ("staticmethod", "function", here),
        "victim.layers:Layer.size": ("property", "function", here),
        "victim.layers:Layer.weight": ("property", "function", here),
        "victim.layers:Layer.slow": ("property", "function", here),
        "victim.layers:Layer.Inner.step": ("method", "function", here),
        "victim.layers:Layer.added": ("attribute", "function", here),
        "victim.layers:Norm": ("class", "class", replacement),
        "victim.layers:Masked.forward": ("method", "function", line_of(Masked.forward)),
        "victim:join": ("function", "function", here),
        "victim.layers:functools": ("module", "module", "faketools"),
    }


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("site")
    yield make(folder)
    forget(folder)


@pytest.fixture(scope="module")
def stock(victim: ModuleType) -> Foreign:
    return patches.foreign("victim")


@pytest.fixture(scope="module")
def found(victim: ModuleType, stock: Foreign) -> patches.Foreign:
    plant(victim)
    return patches.foreign("victim")


def test_an_unpatched_package_has_nothing(stock: Foreign) -> None:
    assert list(stock) == []
    assert str(stock) == "nobody else has patched anything"


@pytest.mark.parametrize("target", expected())
def test_a_planted_patch_is_found_with_its_source(found: Foreign, target: str) -> None:
    kind, how, source = expected()[target]
    one = next(one for one in found if one.target == target)
    assert (one.kind, one.how) == (kind, how)
    outermost = one.defined_at[0] if one.defined_at else ""
    assert source in outermost if source else not outermost


def test_nothing_else_is_found(found: Foreign) -> None:
    assert sorted(one.target for one in found) == sorted(expected())
    assert found.unchecked == {}


def test_the_whole_chain_of_wrappers_is_shown(victim: ModuleType, stock: Foreign) -> None:
    victim.functions.chained = around(wrapt.FunctionWrapper(foreign_function, wrapper))
    one = next(one for one in patches.foreign("victim") if one.target == "victim.functions:chained")
    assert one.defined_at == tuple(map(line_of, (around(foreign_function), wrapper, foreign_function)))
    del victim.functions.chained


def test_what_this_registry_has_installed_is_left_to_the_audit(victim: ModuleType, found: Foreign) -> None:
    before = sorted(one.target for one in found)
    traced = declare("traced", "victim.layers:Other.forward")
    ours = [
        traced,
        declare("item", "victim.functions:REGISTRY['relu']"),
        declare("own", "victim.functions:own_decorator"),
    ]
    with patches.transaction(*ours, reason="a test"):
        assert sorted(one.target for one in patches.foreign("victim")) == before
        patches.disable("fake.own")
        assert sorted(one.target for one in patches.foreign("victim")) == before
        victim.functions.own_decorator = around(buried := victim.functions.own_decorator)
        on_top = [one for one in patches.foreign("victim") if one.target == "victim.functions:own_decorator"]
        assert [one.defined_at[0] for one in on_top] == [line_of(around(foreign_function))]
        victim.functions.own_decorator = buried


def test_nothing_is_imported_or_computed(victim: ModuleType) -> None:
    asked = []

    def forbidden(name: str) -> Any:
        asked.append(name)
        raise AttributeError(name)

    victim.__getattr__ = forbidden
    before = dict(sys.modules)
    found = patches.foreign("victim")
    del victim.__getattr__
    assert asked == []
    assert {name: module for name, module in sys.modules.items() if before.get(name) is not module} == {}
    assert "victim:__getattr__" in [one.target for one in found]


def test_a_module_loaded_since_is_compared_too(victim: ModuleType, found: Foreign) -> None:
    lazily = importlib.import_module("victim.lazily")
    assert [one.target for one in patches.foreign("victim") if "lazily" in one.target] == []
    lazily.loaded_later = foreign_function
    assert [one.target for one in patches.foreign("victim") if "lazily" in one.target] == ["victim.lazily:loaded_later"]


def test_a_replaced_module_is_one_patch(victim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "victim.functions", mock.MagicMock())
    found = [one for one in patches.foreign("victim") if one.target.startswith("victim.functions")]
    assert [(one.target, one.kind, one.how) for one in found] == [("victim.functions", "module", "mock")]


def test_a_replaced_builtin_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [one.target for one in patches.foreign("builtins") if "sorted" in one.target] == []
    monkeypatch.setattr(builtins, "sorted", around(sorted))
    (one,) = [one for one in patches.foreign("builtins") if "sorted" in one.target]
    assert (one.target, one.kind, one.how) == ("builtins:sorted", "builtin", "wraps")
    assert one.owner == ""


def test_what_one_library_does_to_another_on_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        tmp_path,
        {
            "lower/__init__.py": "def step(): return 1\n",
            "upper/__init__.py": "import lower\ndef step(): return 2\nlower.step = step\n",
            "lower-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: lower\nVersion: 1\n",
            "lower-1.dist-info/RECORD": "lower/__init__.py,,\n",
            "upper-2.dist-info/METADATA": "Metadata-Version: 2.1\nName: upper\nVersion: 2\nRequires-Dist: lower\n",
            "upper-2.dist-info/RECORD": "upper/__init__.py,,\n",
        },
    )
    monkeypatch.syspath_prepend(tmp_path)
    program = (
        "import upper, patches\n"
        "for one in patches.foreign('upper', 'lower'): print(one.target, one.how, one.defined_at, one.owner)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path.cwd())])}
    ran = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60, env=environment
    )
    assert ran.stdout.strip() == f"lower:step function ('{tmp_path}/upper/__init__.py:2',) upper 2"


def test_a_module_that_cannot_be_imported_again_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"once.py": "import sys\nassert hasattr(sys, 'let_once_in'), 'not again'\ndef f(): return 1\n"})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "let_once_in", True, raising=False)
    importlib.import_module("once")
    found = patches.foreign("once")
    monkeypatch.delitem(sys.modules, "once")
    assert list(found) == []
    assert found.unchecked == {"once": "AssertionError: not again"}
    assert "not compared: once: AssertionError: not again" in str(found)


@pytest.mark.parametrize(
    ("packages", "says"), [((), "got none"), (("no_such_package",), "'no_such_package' is not imported")]
)
def test_nothing_to_look_at_is_refused(packages: tuple[str, ...], says: str) -> None:
    with pytest.raises(patches.ForeignError, match=says):
        patches.foreign(*packages)


def test_a_clean_process_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"slowly.py": "import sys, time\nif not hasattr(sys, 'quickly'): time.sleep(60)\n"})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "quickly", True, raising=False)
    importlib.import_module("slowly")
    with pytest.raises(patches.ForeignError, match=r"after 0\.5 s"):
        patches.foreign("slowly", timeout=0.5)
    monkeypatch.delitem(sys.modules, "slowly")


def test_the_command_shows_what_an_imported_module_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"quietly.py": "import textwrap\ndef dedent(text): return text\ntextwrap.dedent = dedent\n"})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(textwrap, "dedent", textwrap.dedent)
    arguments = ["audit", "--foreign", "textwrap", "--import", "quietly"]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0
    assert ran.stdout.splitlines()[1].split() == ["textwrap:dedent", "function", "function", f"{tmp_path}/quietly.py:2"]
    facts = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [one["target"] for one in facts["patches"]] == ["textwrap:dedent"]
    assert facts["unchecked"] == {}
    monkeypatch.delitem(sys.modules, "quietly")
    assert CliRunner().invoke(app, ["audit", "--foreign", "no_such_package"]).exit_code == 2


def test_the_comparison_is_imported_on_use() -> None:
    program = (
        "import sys, patches\n"
        "assert not [name for name in sys.modules if name.startswith('patches.foreign.')]\n"
        "import patches.foreign.compare\n"
        "assert callable(patches.foreign)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
