from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

import patches
from patches.cli import app
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import copies, functions, layers
from tests.helpers.snapshot import Snapshot

pytestmark = pytest.mark.usefixtures("unchanged")

COPIES = copies.__name__
SCALE = f"{FUNCTIONS}:scale"
FOUND = {f"{COPIES}:{path}" for path in ("scale", "resize", "BY_NAME['scale']", "IN_ORDER[0]")}


@pytest.fixture(autouse=True)
def restored_copies() -> Iterator[None]:
    taken, table, order = Snapshot(copies, copies.Taker), dict(copies.BY_NAME), list(copies.IN_ORDER)
    yield
    differences = [*taken.differences(), *(["BY_NAME"] if table != copies.BY_NAME else [])]
    taken.restore()
    copies.BY_NAME.update(table)
    assert [*differences, *(["IN_ORDER"] if order != copies.IN_ORDER else [])] == []


def where(target: str | patches.Patch, holds: str = "original") -> set[str]:
    return {alias.where for alias in patches.aliases(target) if alias.holds == holds}


def applied(target: str, **fields: Any) -> patches.Transaction:
    return patches.transaction(declare("a", target, aliases="rewrite", **fields), reason="a test")


def test_copies_are_found_by_identity() -> None:
    assert where(SCALE) == FOUND
    assert where(f"{LAYERS}:Base.forward") == {f"{COPIES}:run", f"{COPIES}:Taker.take"}
    assert where(f"{LAYERS}:Base.add") == {f"{COPIES}:add"}
    assert f"{COPIES}:Base" in where(f"{LAYERS}:Base")
    assert where(f"{FUNCTIONS}:describe") == set()


def test_copies_are_told_while_the_patch_is_active() -> None:
    patch = declare("a", SCALE)
    with patches.transaction(patch, reason="a test"):
        assert where(patch) == FOUND
        assert where(patch, "patched") == set()
        (row,) = patches.audit(aliases=True)
        assert set(row.aliases) == FOUND
        assert f"calls pass by fake.a through {COPIES}:BY_NAME['scale']" in str(patches.audit(aliases=True))
        assert patches.audit()[0].aliases == ()
    with patches.transaction(declare("a", SCALE, aliases="ignore"), reason="a test"):
        assert patches.audit(aliases=True)[0].aliases == ()


def test_rewritten_copies_are_patched_and_restored() -> None:
    with applied(SCALE) as tx:
        every = (copies.scale, copies.resize, copies.BY_NAME["scale"], copies.IN_ORDER[0])
        assert [call(2) for call in every] == [("a", 4)] * 4
        assert where(tx.receipts[0].patch, "patched") == FOUND
        assert patches.audit(aliases=True)[0].aliases == ()
    assert all(held is functions.scale for held in (copies.scale, copies.resize, *copies.IN_ORDER))


def test_rewritten_copies_of_methods_keep_their_instance() -> None:
    seen: list[Any] = []

    def note(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        seen.append(instance)
        return wrapped(*args, **kwargs)

    base, taker = layers.Base(), copies.Taker()
    with applied(f"{LAYERS}:Base.forward", wrapper=note):
        assert copies.run(base, 1) == ("Base", 1)
        assert taker.take(1) == ("Taker", 1)  # type: ignore[misc]
    assert seen == [base, taker]


def test_a_rewritten_staticmethod() -> None:
    stock = layers.Base.add
    with applied(f"{LAYERS}:Base.add"):
        assert copies.add(1, 2) == ("a", 3)
    assert copies.add is layers.Base.add is stock


@pytest.mark.parametrize(("target", "name"), [("Base.forward", "forward"), ("Base.add", "add")])
def test_a_copy_made_meanwhile_gets_the_original(target: str, name: str) -> None:
    late: Any = types.ModuleType("late_importer")
    sys.modules["late_importer"] = late
    try:
        with applied(f"{LAYERS}:{target}"):
            late.copy = getattr(layers.Base, name)
        assert late.copy is getattr(layers.Base, name)
    finally:
        del sys.modules["late_importer"]


def test_copies_follow_when_patches_come_and_go() -> None:
    other = declare("b", SCALE)
    with applied(SCALE):
        with patches.transaction(other, reason="a test"):
            assert copies.scale(2) == functions.scale(2) == ("b", ("a", 4))
        assert copies.scale is functions.scale
    with patches.transaction(other, reason="a test"):
        with applied(SCALE):
            assert copies.scale is functions.scale
        assert copies.scale(2) == 4
        assert functions.scale(2) == ("b", 4)


def test_a_copy_that_somebody_else_changed_is_left_as_found() -> None:
    theirs: Any = lambda x: x  # noqa: E731
    with applied(SCALE):
        copies.resize = theirs
    assert copies.resize is theirs
    copies.resize = functions.scale


def test_a_copy_in_a_module_that_is_gone_is_restored() -> None:
    gone: Any = types.ModuleType("gone_module")
    gone.scale = functions.scale
    sys.modules["gone_module"] = gone
    with applied(SCALE):
        del sys.modules["gone_module"]
        assert gone.scale(2) == ("a", 4)
    assert gone.scale is functions.scale


def test_a_replaced_class_is_rewritten() -> None:
    stock = layers.Base
    target = f"{LAYERS}:Base"
    with applied(target, kind="class", wrapper=lambda wrapped, *_: type("Better", (wrapped(),), {})):
        assert copies.Base is layers.Base is not stock
    assert copies.Base is layers.Base is stock


def test_a_failing_block_restores_copies() -> None:
    with pytest.raises(ZeroDivisionError), applied(SCALE):
        raise ZeroDivisionError
    assert copies.scale is functions.scale


def test_modules_that_import_on_access_stay_asleep() -> None:
    class Lazy(types.ModuleType):
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(f"the sweep asked for {name}")

    sys.modules["lazy_one"] = Lazy("lazy_one")
    sys.modules["no_module"] = object()  # type: ignore[assignment]
    try:
        before = set(sys.modules)
        assert where(SCALE) == FOUND
        assert set(sys.modules) == before
    finally:
        del sys.modules["lazy_one"], sys.modules["no_module"]


def test_the_policy_is_checked() -> None:
    with pytest.raises(patches.DefinitionError, match="report, rewrite, ignore") as caught:
        declare("a", SCALE, aliases="rewirte")
    assert caught.value.field == "aliases"


def test_the_command_line_lists_copies() -> None:
    shown = CliRunner().invoke(app, ["aliases", SCALE, "--import", COPIES, "--json"])
    assert {row["where"] for row in json.loads(shown.stdout)} == FOUND
    assert "original" in CliRunner().invoke(app, ["aliases", SCALE]).stdout
    assert "no copy" in CliRunner().invoke(app, ["aliases", f"{FUNCTIONS}:describe"]).stdout


REAL = """
import sys, warnings
warnings.simplefilter("error")
import transformers, patches
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes
    from torch.distributed.fsdp import fully_shard
before = set(sys.modules)
found = [alias.where for alias in patches.aliases("bitsandbytes.autograd._functions:matmul_4bit")]
assert found == ["bitsandbytes:matmul_4bit"], found
found = patches.aliases("torch.distributed.fsdp._fully_shard._fully_shard:fully_shard")
assert len(found) >= 3, found
assert set(sys.modules) == before, set(sys.modules) - before
"""


def test_on_real_libraries_nothing_is_imported() -> None:
    ran = subprocess.run([sys.executable, "-c", REAL], check=False, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
