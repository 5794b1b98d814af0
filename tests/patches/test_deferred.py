from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import patches
from tests.helpers.declare import FUNCTIONS, declare

pytestmark = pytest.mark.usefixtures("unchanged")

LATE = {
    "__init__.py": "started = True\nfrom . import early\ndone = True\n",
    "early.py": "def one(): return 1\ndef two(): return 2\n",
    "sub/__init__.py": "",
    "sub/deep.py": "class Thing:\n    def run(self): return 3\n",
    "broken.py": "def one(): return 1\nraise RuntimeError('broken')\n",
    "slow.py": "import time\ntime.sleep(0.3)\ndef one(): return 1\n",
}


@pytest.fixture(autouse=True)
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in LATE.items():
        (tmp_path / "late_lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "late_lib" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    yield tmp_path / "late_lib"
    left = [row.id for row in patches.audit()]
    for patch_id in set(left):
        patches.revert(patch_id)
    for name in [name for name in sys.modules if name.startswith("late_lib")]:
        del sys.modules[name]
    assert left == []
    assert sys.meta_path == finders


def import_late(name: str = "late_lib.early") -> Any:
    return importlib.import_module(name)


def states() -> dict[str, str]:
    return {row.id: row.state.value for row in patches.audit()}


ONE, TWO = "late_lib.early:one", "late_lib.early:two"


def test_a_patch_waits_for_its_module() -> None:
    with patches.transaction(declare("a", ONE), reason="a test", deferred=True) as tx:
        assert "late_lib" not in sys.modules
        assert tx.receipts == []
        assert states() == {"fake.a": "pending"}
        assert patches.audit()[0].note == "waits for late_lib.early"
        assert patches.active() == []
        assert import_late().one() == ("a", 1)
        assert states() == {"fake.a": "active"}
        assert patches.active() == tx.deferred
    assert import_late().one() == 1


def test_a_block_that_ends_cancels_what_still_waits() -> None:
    with patches.transaction(declare("a", ONE), reason="a test", deferred=True) as tx:
        pass
    assert tx.deferred[0].state == "reverted"
    assert import_late().one() == 1


def test_committed_it_waits_on() -> None:
    with patches.transaction(declare("a", ONE), reason="a test", deferred=True) as tx:
        tx.commit()
    assert import_late().one() == ("a", 1)
    assert patches.revert("fake.a") == tx.deferred
    assert import_late().one() == 1


def test_what_is_imported_is_patched_at_once() -> None:
    scale = importlib.import_module(FUNCTIONS).scale
    deferred = patches.defer(declare("a", f"{FUNCTIONS}:scale"), declare("b", ONE), reason="a test")
    assert [receipt.state for receipt in deferred.receipts] == ["active", "pending"]
    assert importlib.import_module(FUNCTIONS).scale(2) == ("a", 4)
    patches.revert("fake.a", "fake.b")
    assert importlib.import_module(FUNCTIONS).scale is scale


def test_it_can_be_cancelled() -> None:
    deferred = patches.defer(declare("a", ONE), declare("b", "late_lib.sub.deep:Thing.run"), reason="a test")
    assert import_late().one() == ("a", 1)
    assert deferred.cancel() == [deferred.receipts[1]]
    assert deferred.pending == []
    assert import_late("late_lib.sub.deep").Thing().run() == 3
    assert states() == {"fake.a": "active"}
    patches.revert("fake.a")


def test_a_pending_patch_can_be_reverted_by_id() -> None:
    patches.defer(declare("a", ONE), reason="a test")
    patches.revert("fake.a")
    assert import_late().one() == 1


def test_a_submodule_is_waited_for_alone() -> None:
    deferred = patches.defer(declare("a", "late_lib.sub.deep:Thing.run"), reason="a test")
    import_late("late_lib.sub")
    assert deferred.pending
    assert import_late("late_lib.sub.deep").Thing().run() == ("a", 3)
    patches.revert("fake.a")


def test_it_is_there_before_the_rest_of_the_package_copies_the_original(late: Path) -> None:
    (late / "__init__.py").write_text("from .early import one\n")
    patches.defer(declare("a", ONE), reason="a test")
    assert import_late("late_lib").one() == ("a", 1)
    patches.revert("fake.a")


def test_a_probe_sees_the_whole_package() -> None:
    seen = []

    def probe() -> bool:
        seen.append(getattr(import_late("late_lib"), "done", False))
        return True

    patches.defer(declare("a", ONE, probe=probe), reason="a test")
    assert import_late().one() == ("a", 1)
    assert seen == [True]
    patches.revert("fake.a")


def test_an_obsolete_patch_is_skipped() -> None:
    deferred = patches.defer(declare("a", ONE, probe=lambda: False), reason="a test")
    assert import_late().one() == 1
    assert deferred.receipts[0].state == "skipped"
    assert deferred.receipts[0].verdict.kind == "obsolete"


def raising(error: BaseException) -> Callable[[], None]:
    def verify() -> None:
        raise error

    return verify


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"target": "late_lib.early:gone"}, "no attribute 'gone'"),
        ({"probe": raising(RuntimeError("probing"))}, "probing"),
        ({"verify": raising(RuntimeError("no effect"))}, "no effect"),
        ({"requires": {"no-such-distribution": ""}}, "not installed"),
    ],
)
def test_one_that_fails_fails_neither_the_import_nor_the_others(fields: dict[str, Any], why: str) -> None:
    bad = {"target": ONE, **fields}
    patches.defer(declare("bad", bad.pop("target"), **bad), declare("good", TWO), reason="a test")
    with pytest.warns(patches.DeferredPatchWarning, match=why):
        early = import_late()
    assert (early.one(), early.two()) == (1, ("good", 2))
    assert states() == {"fake.bad": "failed", "fake.good": "active"}
    assert why in next(row.note for row in patches.audit() if row.id == "fake.bad")
    patches.revert("fake.bad", "fake.good")
    assert states() == {}


def test_warnings_that_are_errors_do_not_fail_the_import() -> None:
    patches.defer(declare("bad", "late_lib.early:gone"), reason="a test")
    assert import_late().one() == 1  # pytest makes errors of warnings
    assert states() == {"fake.bad": "failed"}
    patches.revert("fake.bad")


def test_what_it_needs_is_waited_for_too() -> None:
    patches.register(declare("deferred-needed", "late_lib.sub.deep:Thing.run"))
    patches.defer(declare("a", ONE, needs=("fake.deferred-needed",)), reason="a test")
    assert import_late().one() == 1
    assert import_late("late_lib.sub.deep").Thing().run() == ("deferred-needed", 3)
    assert import_late().one() == ("a", 1)
    patches.revert("fake.a", "fake.deferred-needed")


def test_what_needs_a_failed_one_fails() -> None:
    patches.register(declare("deferred-broken", "late_lib.sub.deep:Thing.gone"))
    patches.defer(declare("a", ONE, needs=("fake.deferred-broken",)), reason="a test")
    import_late()
    with pytest.warns(patches.DeferredPatchWarning):
        import_late("late_lib.sub.deep")
    assert states() == {"fake.a": "failed", "fake.deferred-broken": "failed"}
    patches.revert("fake.a", "fake.deferred-broken")


def test_an_import_that_raises_can_be_tried_again(late: Path) -> None:
    deferred = patches.defer(declare("a", "late_lib.broken:one"), reason="a test")
    with pytest.raises(RuntimeError, match="broken"):
        import_late("late_lib.broken")
    assert deferred.pending
    (late / "broken.py").write_text("def one(): return 10\n")
    importlib.invalidate_caches()
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        assert import_late("late_lib.broken").one() == ("a", 10)
    finally:
        sys.dont_write_bytecode = before
    patches.revert("fake.a")


def test_the_module_is_left_with_its_own_loader() -> None:
    patches.defer(declare("a", ONE), reason="a test")
    spec = importlib.util.find_spec("late_lib.early")
    assert spec is not None
    assert "def one" in spec.loader.get_source("late_lib.early")  # type: ignore[union-attr]
    early = import_late()
    other = import_late("late_lib.sub")
    assert type(early.__loader__) is type(early.__spec__.loader) is type(other.__loader__)
    assert "def two" in inspect.getsource(early.two)
    patches.revert("fake.a")


def test_conflicts_are_refused_while_both_wait() -> None:
    patches.defer(declare("a", ONE), reason="a test")
    with pytest.raises(patches.ConflictError, match=r"fake\.b"):
        patches.defer(declare("b", TWO, conflicts=("fake.a",)), reason="a test")
    assert states() == {"fake.a": "pending"}
    patches.revert("fake.a")


def test_instances_need_the_module() -> None:
    with pytest.raises(patches.ScopeError, match="is not imported"):
        patches.defer(patches.on(declare("a", "late_lib.sub.deep:Thing.run"), [Path()]), reason="a test")


def test_a_savepoint_cancels_what_was_deferred_since() -> None:
    with patches.transaction(declare("a", ONE), reason="a test", deferred=True) as tx:
        savepoint = tx.savepoint()
        tx.apply(declare("b", TWO))
        savepoint.rollback()
        early = import_late()
        assert (early.one(), early.two()) == (("a", 1), 2)


def test_threads_that_import_and_cancel() -> None:
    for round_ in range(5):
        for name in [name for name in sys.modules if name.startswith("late_lib")]:
            del sys.modules[name]
        deferred = patches.defer(declare("a", "late_lib.slow:one"), declare("b", TWO), reason="a test")
        importers = [threading.Thread(target=import_late, args=("late_lib.slow",)) for _ in range(4)]
        for thread in importers:
            thread.start()
        if round_ % 2:
            deferred.cancel()
        for thread in importers:
            thread.join(timeout=20)
            assert not thread.is_alive()
        outcome = import_late("late_lib.slow").one()
        patches.revert(*deferred.receipts)
        assert outcome in (1, ("a", 1))
        assert round_ % 2 or outcome == ("a", 1)
        assert import_late("late_lib.slow").one() == 1


class First(MetaPathFinder):
    """A finder that others put before ours, and that finds one module without asking anyone."""

    def __init__(self, name: str, file: Path) -> None:
        self.name = name
        self.file = file

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(fullname, self.file) if fullname == self.name else None


@pytest.fixture
def put_first(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    added: list[Any] = []

    def put(finder: Any) -> None:
        added.append(finder)
        sys.meta_path.insert(0, finder)

    yield put
    for finder in added:
        sys.meta_path.remove(finder)


@pytest.mark.parametrize("name", ["late_lib_alone", "late_lib.early"])
def test_a_finder_put_before_ours_changes_nothing(name: str, late: Path, put_first: Callable[[Any], None]) -> None:
    patches.defer(declare("a", f"{name}:one"), reason="a test")
    put_first(First(name, late / "early.py"))
    assert import_late(name).one() == ("a", 1)
    assert type(import_late(name).__spec__.loader).__module__ == "_frozen_importlib_external"
    patches.revert("fake.a")


def test_finders_that_others_put_in_and_take_out_meanwhile_are_kept(put_first: Callable[[Any], None]) -> None:
    plain, saved = sys.meta_path, list(sys.meta_path)
    patches.defer(declare("a", ONE), reason="a test")
    taken = list(sys.meta_path)
    mine = First("late_lib_none", Path())
    put_first(mine)
    sys.meta_path[:] = [mine, *taken]  # as who took a copy puts it back
    patches.revert("fake.a")
    assert sys.meta_path is plain
    assert sys.meta_path == [mine, *saved]


def test_a_module_put_there_by_hand_is_noticed_when_asked() -> None:
    deferred = patches.defer(declare("a", "late_lib_by_hand:one"), reason="a test")
    module = ModuleType("late_lib_by_hand")
    module.one = lambda: 1  # type: ignore[attr-defined]
    sys.modules["late_lib_by_hand"] = module
    assert states() == {"fake.a": "active"}
    assert module.one() == ("a", 1)
    assert patches.active() == deferred.pending + list(deferred.receipts)
    patches.revert("fake.a")


def test_a_module_put_there_by_hand_is_noticed_with_the_next_import(late: Path) -> None:
    patches.defer(declare("a", "late_lib_by_hand:one"), reason="a test")
    module = sys.modules["late_lib_by_hand"] = ModuleType("late_lib_by_hand")
    module.one = lambda: 1  # type: ignore[attr-defined]
    import_late("late_lib")
    assert module.one() == ("a", 1)
    patches.revert("fake.a")


def test_a_module_executed_by_hand_is_patched_when_it_is_done(late: Path) -> None:
    (late / "made.py").write_text(
        "one = None\nimport late_lib.early\nimport patches\npatches.audit()\ndef one(): return 1\n"
    )
    patches.defer(declare("a", "late_lib_made:one"), reason="a test")
    spec = importlib.util.spec_from_file_location("late_lib_made", late / "made.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["late_lib_made"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert states() == {"fake.a": "active"}
    assert module.one() == ("a", 1)
    patches.revert("fake.a")


def lazily(name: str) -> ModuleType:
    """A module that executes itself when it is used, made as importlib's documentation says."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("before", [False, True])
def test_a_lazy_module_is_patched_when_it_executes_itself(before: bool, late: Path) -> None:
    (late / "early.py").write_text("import late_lib.ran\ndef one(): return 1\n")
    (late / "ran.py").write_text("")
    (late / "__init__.py").write_text("")
    lazy = lazily("late_lib.early") if before else None
    patches.defer(declare("a", ONE), reason="a test")
    lazy = lazy or lazily("late_lib.early")
    assert states() == {"fake.a": "pending"}
    assert "late_lib.ran" not in sys.modules
    assert lazy.one() == ("a", 1)
    assert states() == {"fake.a": "active"}
    assert type(lazy.__spec__.loader).__module__ == "_frozen_importlib_external"  # type: ignore[union-attr]
    patches.revert("fake.a")


def test_a_lazy_finder_stays_lazy(late: Path, put_first: Callable[[Any], None]) -> None:
    class Lazy(First):
        def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
            spec = super().find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = importlib.util.LazyLoader(spec.loader)
            return spec

    (late / "ran.py").write_text("import late_lib.sub\ndef one(): return 1\n")
    put_first(Lazy("late_lib_lazy", late / "ran.py"))
    patches.defer(declare("a", "late_lib_lazy:one"), reason="a test")
    lazy = import_late("late_lib_lazy")
    assert (states(), "late_lib.sub" in sys.modules) == ({"fake.a": "pending"}, False)
    assert lazy.one() == ("a", 1)
    patches.revert("fake.a")


def test_a_probe_waits_for_a_package_without_a_file(late: Path) -> None:
    (late.parent / "late_lib_space").mkdir()
    (late.parent / "late_lib_space" / "one.py").write_text("def one(): return 1\n")
    patches.defer(declare("a", "late_lib_space.one:one", probe=lambda: True), reason="a test")
    assert import_late("late_lib_space.one").one() == ("a", 1)
    patches.revert("fake.a")


def test_each_is_forced_or_not_as_it_was_asked() -> None:
    patches.defer(declare("a", ONE, probe=lambda: False), reason="a test", force=True)
    patches.defer(declare("b", TWO, probe=lambda: False), reason="a test")
    early = import_late()
    assert (early.one(), early.two()) == (("a", 1), 2)
    patches.revert("fake.a")


def test_a_probe_that_asks_the_registry_is_not_asked_again_meanwhile() -> None:
    asked = []

    def probe() -> bool:
        asked.append(patches.active())
        import_late("late_lib.sub.deep")
        return True

    patches.defer(declare("a", ONE, probe=probe), declare("b", "late_lib.sub.deep:Thing.run"), reason="a test")
    assert import_late().one() == ("a", 1)
    assert asked == [[]]
    patches.revert("fake.a", "fake.b")


def test_a_child_forked_while_somebody_imports_can_import(late: Path) -> None:
    patches.defer(declare("a", ONE), reason="a test")
    pending = patches.activation.ACTIVATIONS.pending
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with pending._lock:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(0 if import_late().one() == ("a", 1) else 1)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
    patches.revert("fake.a")


def atomic(name: str, second: str) -> None:
    patches.register(declare(f"{name}-one", ONE))
    patches.register(declare(f"{name}-two", second))
    patches.bundle(name, [f"fake.{name}-one", f"fake.{name}-two"], atomic=True)


def test_an_atomic_bundle_waits_until_all_of_it_can_be_applied() -> None:
    atomic("late-whole", "late_lib.sub.deep:Thing.run")
    with patches.transaction("late-whole", reason="a test", deferred=True):
        assert import_late().one() == 1
        assert set(states().values()) == {"pending"}
        assert import_late("late_lib.sub.deep").Thing().run() == ("late-whole-two", 3)
        assert import_late().one() == ("late-whole-one", 1)


def test_an_atomic_bundle_fails_as_a_whole() -> None:
    atomic("late-half", "late_lib.sub.deep:Thing.gone")
    with patches.transaction("late-half", reason="a test", deferred=True):
        import_late()
        with pytest.warns(patches.DeferredPatchWarning, match="gone") as told:
            import_late("late_lib.sub.deep")
        assert len(told) == 2
        assert import_late().one() == 1
        assert set(states().values()) == {"failed"}


def test_several_targets_wait_for_the_first_module_that_comes() -> None:
    patch = patches.Patch(
        id="fake.a", target=("late_lib.never:one", ONE), wrapper=lambda wrapped, *_: "patched", reason="a test"
    )
    patches.defer(patch, reason="a test")
    assert patches.audit()[0].note == "waits for late_lib.early or late_lib.never"
    assert import_late().one() == "patched"
    patches.revert("fake.a")


def test_an_object_in_hand_waits_for_nothing() -> None:
    held = type("Held", (), {"one": lambda self: 1, "__module__": "late_lib.gone"})()
    patch = patches.Patch(id="fake.a", target=patches.at(held, "one"), replace=lambda self: 2, reason="a test")
    deferred = patches.defer(patch, reason="a test")
    assert (deferred.pending, held.one()) == ([], 2)
    patches.revert("fake.a")
