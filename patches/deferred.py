"""Deferred application: a patch is applied as soon as its module is imported, by whatever way.

wrapt's import hooks are not used, because they cannot be removed, and an error in one fails the import.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from .errors import ApplyError, DeferredPatchWarning, PatchError, ScopeError
from .ledger import Receipt, State
from .patch import Patch, Scoped
from .registry import atomic_bundles, select
from .slot import in_order, refuse_conflicts
from .target import MISSING

if TYPE_CHECKING:
    from .activation import Activations
    from .plan import Item

__all__ = ["Deferred", "Pending", "defer", "split"]

_PATIENCE: Final = 60.0
"""Seconds to wait for other threads. Without a limit, a thread that waits for our import would deadlock with us."""


@dataclass(kw_only=True, eq=False)
class _Wait:
    """One receipt's wait: sets of modules, of each of which one must have been executed."""

    modules: frozenset[frozenset[str]]
    force: bool
    bundle: str
    """The atomic bundle that it is applied with, as a whole or not at all, or ""."""
    applying: bool = False


class Pending(MetaPathFinder):
    """Receipts that wait for their modules, and the finder that sees them imported, by wrapping their loaders.

    Thread-safe; holds no lock while anything else is called.

    A module counts as imported when it has been executed. One that came past the finder, such as one that was put into
    `sys.modules` by hand, is noticed after the next import of any other, or when the registry is next asked.
    """

    def __init__(self, activations: Activations) -> None:
        self._activations = activations
        self._waits: dict[Receipt, _Wait] = {}
        self._lock = threading.RLock()
        self._names: frozenset[str] = frozenset()
        self._plain: list[Any] | None = None
        """`sys.meta_path` as it is while nothing waits."""

    def receipts(self) -> list[Receipt]:
        """The receipts that wait, oldest first."""
        return list(self._waits)

    def is_forced(self, receipt: Receipt) -> bool:
        """Whether the receipt waits to be applied even if it is obsolete."""
        wait = self._waits.get(receipt)
        return wait is not None and wait.force

    def postpone(self, receipt: Receipt, *, force: bool, bundle: str = "") -> None:
        """Apply the receipt once its patch's missing modules are imported, or now if they are by now.

        With `bundle`, those of all members of that atomic bundle.

        It is applied in the thread that imports the last of them. An error then neither fails the import nor keeps
        other patches from being applied: the ledger and the audit say `failed` and why, and DeferredPatchWarning is
        issued.
        """
        owner = self._activations
        with owner.lock:
            refuse_conflicts([*(other.patch for other in owner.in_force()), receipt.patch])
            missing = _missing(*(select(bundle) if bundle else [receipt.patch]))
            names = ", ".join(sorted(" or ".join(sorted(group)) for group in missing))
            with self._lock:
                self._waits[receipt] = _Wait(modules=missing, force=force, bundle=bundle)
                self._watch()
            owner.ledger.record(receipt, State.PENDING, f"waits for {names}")

    def take(self, receipt: Receipt) -> bool:
        """Remove a pending receipt; returns False if it was not pending any more."""
        with self._lock:
            waited = self._waits.pop(receipt, None) is not None
            if waited:
                self._watch()
            return waited

    def notice(self, *executed: str) -> None:
        """Apply whatever waits for no module any more. Not to be called with a lock held: a probe may import."""
        if not self._waits:
            return
        ready: dict[object, list[Receipt]] = {}
        begun: list[_Wait] = []
        there = {*executed, *filter(_is_settled, self._names)}
        try:
            with self._lock:
                for wait in self._waits.values():
                    wait.modules = frozenset(group for group in wait.modules if group.isdisjoint(there))
                self._watch()
                for receipt, wait in self._waits.items():
                    if wait.modules or wait.applying:
                        continue
                    ready.setdefault(wait.bundle or receipt, []).append(receipt)
                    begun.append(wait)
                    wait.applying = True  # so that a probe which imports or asks does not begin it again
            for together in ready.values():
                self._apply_or_fail(together)
        finally:
            for wait in begun:
                wait.applying = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec from the other finders, with a loader that tells when it is done.

        While a module that is waited for is there, though not told of, every other import tells too: afterwards, since
        the import system holds its lock over all modules here.
        """
        if fullname not in self._names and sys.modules.keys().isdisjoint(self._names):
            return None
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(fullname, path, target)
            if spec is not None:
                self._tell(spec)
                return spec
        return None

    def _tell(self, spec: ModuleSpec) -> None:
        if hasattr(spec.loader, "exec_module") and not isinstance(spec.loader, _Telling):
            spec.loader = _Telling(spec.loader, self)

    def _watch(self) -> None:
        """Be in `sys.meta_path` while anything waits. Called with the lock held."""
        if self._plain is None:  # not on import, which must have no effect outside this package
            os.register_at_fork(after_in_child=self._begin_child)
            self._plain = sys.meta_path
        self._names = frozenset(name for wait in self._waits.values() for group in wait.modules for name in group)
        found, ours = sys.meta_path, isinstance(sys.meta_path, _Finders) and sys.meta_path.first is self
        if self._names and found and not ours:  # there is none while Python shuts down
            self._plain, sys.meta_path = found, _Finders(self, found)
        elif ours and not self._names:
            self._plain[:], sys.meta_path = [finder for finder in found if finder is not self], self._plain
        for module in filter(_is_lazy, map(sys.modules.get, self._names)):
            self._tell(ModuleType.__getattribute__(module, "__spec__"))  # any other way to read it would load it

    def _begin_child(self) -> None:
        # The threads that held the lock, or were applying something, are not in the child.
        self._lock = threading.RLock()
        for wait in self._waits.values():
            wait.applying = False

    def _apply_or_fail(self, together: Sequence[Receipt]) -> None:
        """Apply a receipt, or those of an atomic bundle: all of them, or none."""
        from .plan import acceptable, is_left_out, refuse_to_split

        wait = self._waits.get(together[0])
        force = wait is not None and wait.force
        try:
            if wait is not None and wait.bundle:
                verdicts = {one.patch: acceptable(one.patch, force=force) for one in together}
                left_out = [patch for patch, found in verdicts.items() if is_left_out(patch, found, force=False)]
                refuse_to_split([wait.bundle], [] if force else left_out)
            for receipt in together:
                self._apply(receipt)
        except BaseException as error:
            for receipt in reversed(together):
                self._fail(receipt, error)
            if not isinstance(error, Exception):  # others must not fail somebody else's import
                raise

    def _apply(self, receipt: Receipt) -> None:
        from .plan import acceptable, is_left_out, resolve

        owner, force = self._activations, self.is_forced(receipt)
        found = acceptable(receipt.patch, force=force)
        failed = {other.id for other in owner.failed} & set(receipt.patch.needs)
        if failed - {other.id for other in owner.active()}:
            raise PatchError(f"{receipt.id!r} was not applied: it needs {', '.join(sorted(failed))}, which failed")

        def apply() -> None:
            if not self.take(receipt):
                return  # cancelled meanwhile
            receipt.verdict = found
            if is_left_out(receipt.patch, found, force=force):
                owner.ledger.record(receipt, State.SKIPPED, found.why)
                return
            (place,) = owner.check([receipt.patch], resolve)
            owner.apply(receipt, place)

        if not owner.try_locked(apply, timeout=_PATIENCE):
            why = f"another thread has been changing patches for {_PATIENCE:.0f} s"
            raise ApplyError(f"{receipt.id!r} was not applied: {why}", patch_id=receipt.id)
        owner.drop_stale_graphs()
        if receipt.patch.verify is not None and receipt.state == State.ACTIVE:
            receipt.patch.verify()

    def _fail(self, receipt: Receipt, error: BaseException) -> None:
        why = f"{type(error).__name__}: {error}"
        self._activations.try_locked(lambda: self._activations.fail(receipt, why), timeout=_PATIENCE)
        what = f"{receipt.id!r}, applied at {receipt.by} for when its module is imported, failed"
        with suppress(DeferredPatchWarning):  # an error where warnings are, but the import must not fail
            warnings.warn(f"{what}: {why}", DeferredPatchWarning, stacklevel=2)


def split(items: Iterable[Item], on: Any) -> tuple[list[Item], dict[Patch, str]]:
    """Divide items into those to apply now and the patches to defer, each with the name of its atomic bundle or "".

    In the order of application; imports no target.

    Raises ScopeError for a deferred patch that is limited to instances, since those need the module imported.
    """
    # What applying needs comes first: these import modules that may themselves be waited for.
    for name in ("importlib.metadata", "packaging.specifiers", "json", "socket"):
        importlib.import_module(name)
    from .plan import expand

    now: list[Item] = []
    later: dict[str, Patch] = {}
    names = [name for item in items if isinstance(item, str) for name in atomic_bundles(item)]
    waiting = {patch_id: name for name in names for patch_id in select(name) if _missing(*select(name))}
    for patch, instances in expand(items, on):
        if not _missing(patch) and patch.id not in waiting:
            now.append(patch if instances is None else Scoped(patch=patch, instances=instances))
        elif instances is not None:
            why = f"the module of {patch.target!r} is not imported"
            raise ScopeError(f"{patch.id!r} cannot be limited to instances yet: {why}", patch_id=patch.id)
        else:
            later[patch.id] = patch
    return now, {later[patch_id]: waiting.get(patch_id, "") for patch_id in in_order(later.values())}


class Deferred:
    """The patches of one call of `defer`."""

    def __init__(self, receipts: Sequence[Receipt]) -> None:
        self.receipts = tuple(receipts)
        """One for each patch, applied or pending; `receipt.state` tells which."""

    @property
    def pending(self) -> list[Receipt]:
        """The receipts that still wait for their modules."""
        return [receipt for receipt in self.receipts if receipt.state == State.PENDING]

    def cancel(self) -> list[Receipt]:
        """Cancel the pending receipts, and return them. Applied patches stay until `patches.revert`."""
        from .undo import revert

        return revert(*self.pending)


def defer(*items: Item, reason: str = "", force: bool = False) -> Deferred:
    """Apply patches as soon as anyone imports their modules, or at once if imported already. Imports none.

    A patch without a probe is applied as soon as its module has been executed, before the rest of the package can copy
    the original. A patch with a probe is applied after its whole package has been executed, since the probe may use
    all of it. Patches that it `needs` are waited for as well. A patch that then fails is `failed` in the ledger and in
    the audit, with the error, and a DeferredPatchWarning is issued; the import goes on. Errors that can be found
    without importing are raised at once.
    """
    from .transaction import transaction

    with transaction(*items, reason=reason, force=force, deferred=True) as applied:
        applied.commit()
    return Deferred([*applied.receipts, *applied.deferred])


def _missing(*patches: str | Patch) -> frozenset[frozenset[str]]:
    """The modules that must be imported before the patches can be applied.

    A probe runs the library, so a patch with a probe waits for the whole package. A patch without one waits for the
    module alone, so that the rest of the package already imports the patched object.
    """
    from .plan import expand

    waited: set[frozenset[str]] = set()
    for needed, _ in expand(patches):
        if any(target.held is not MISSING for target in needed.targets):
            continue  # an object in hand
        modules = {target.module for target in needed.targets}
        waited.add(frozenset(modules))
        if needed.probe is not None:
            waited.add(frozenset(module.partition(".")[0] for module in modules))
    return frozenset(group for group in waited if not any(map(_is_there, group)))


def _is_there(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not _is_lazy(module)


def _is_lazy(module: object) -> bool:
    """Whether a module is one of importlib's that load themselves when they are used."""
    return type(module) is getattr(sys.modules.get("importlib.util"), "_LazyModule", None)


def _is_settled(name: str) -> bool:
    """Whether a module is there and is not being executed, by an import or by hand."""
    module = sys.modules.get(name)
    if not _is_there(name) or getattr(getattr(module, "__spec__", None), "_initializing", False):
        return False
    space = getattr(module, "__dict__", None)
    frames = (frame for innermost in sys._current_frames().values() for frame, _ in traceback.walk_stack(innermost))
    return not any(frame.f_globals is space and frame.f_code.co_name == "<module>" for frame in frames)


class _Finders(list[Any]):
    """`sys.meta_path` with a finder that comes first, wherever others insert theirs."""

    def __init__(self, first: Pending, others: Iterable[Any]) -> None:
        super().__init__(others)
        self.first = first

    def __iter__(self) -> Iterator[Any]:
        # A copy that somebody took and put back has ours in it.
        return iter([self.first, *(finder for finder in super().__iter__() if finder is not self.first)])


class _Telling(Loader):
    """A loader that delegates to `loader`, then tells. The module ends up with the original `loader`."""

    def __init__(self, loader: Any, pending: Pending) -> None:
        self._loader = loader
        self._pending = pending

    def __getattr__(self, name: str) -> Any:
        # A caller of `importlib.util.find_spec` may have this loader and ask it for the source.
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then tell; not if execution raises, since the import may be tried again."""
        name, spec = module.__name__, module.__spec__
        if spec is not None and spec.loader is self:
            spec.loader = self._loader
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        self._loader.exec_module(module)
        if not _is_lazy(module):
            self._pending.notice(name)
        elif spec is not None:
            spec.loader = _Telling(spec.loader, self._pending)  # nothing is executed before the module is used
