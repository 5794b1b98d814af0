"""Manifests: the patches of one process as data, to be replayed in another.

A newly started worker (multiprocessing's `spawn`, Ray, a launcher) has none of its parent's patches:

    environment["PATCHES_MANIFEST"] = json.dumps(patches.manifest())       # in the parent
    patches.replay_from_environment()                                      # first thing in the worker
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

from .digest import process_wide, versions_of
from .errors import ManifestError, UnknownPatchError
from .ledger import Receipt
from .patch import Patch
from .plan import verdict
from .registry import REGISTRY
from .transaction import Transaction, transaction
from .undo import active, disable
from .verdict import VerdictKind

__all__ = ["VARIABLE", "manifest", "replay", "replay_from_environment"]

VARIABLE: Final = "PATCHES_MANIFEST"
_FORMAT: Final = 1
_MAIN: Final = ("__main__", "__mp_main__")


def manifest() -> dict[str, Any]:
    """The active patches of this process, for `json.dumps`: `patches`, in order, and `not_replayable`, with reasons.

    Not replayable are patches that are limited to instances, which another process does not have, and patches that are
    not registered, and so cannot be found by id.
    """
    with_grounds = [(receipt, _why_not(receipt)) for receipt in active()]
    entries = {receipt.id: _entry(receipt) for receipt, why in with_grounds if not why}
    left_out = [{"id": receipt.id, "target": receipt.target, "why": why} for receipt, why in with_grounds if why]
    return {"format": _FORMAT, "patches": list(entries.values()), "not_replayable": left_out}


def replay(manifest: Mapping[str, Any]) -> Transaction:
    """Apply and commit all patches of a manifest, or none; returns the transaction.

    Patches that are active already, as in a forked child, are not applied again. For an unknown id, the module that
    defines the wrapper is imported, which should register it. Raises ManifestError, before anything is changed, if a
    version, a target, or a verdict differs from the manifest.
    """
    entries = _read(manifest)
    known = {receipt.id for receipt in process_wide()}
    missing = {entry["id"]: entry for entry in entries if entry["id"] not in known}
    differences = [line for entry in missing.values() for line in _differences(entry, _find(entry))]
    if differences:
        raise ManifestError(
            f"this process differs from that of the manifest: {'; '.join(differences)}; nothing was applied. "
            "Install the same versions, or make a new manifest",
            differences=differences,
        )
    with transaction(
        *missing,
        reason=f"replayed: {'; '.join(dict.fromkeys(entry['reason'] for entry in missing.values())) or 'nothing new'}",
        force=any(entry["options"]["force"] for entry in missing.values()),
        count_calls=any(entry["options"]["count_calls"] for entry in missing.values()),
    ) as done:
        _disable(done.receipts, missing)
        done.commit()
    return done


def replay_from_environment() -> Transaction | None:
    """Replay the manifest in `PATCHES_MANIFEST`, JSON or the path of a JSON file; returns None if it is not set.

    Like PYTHONPATH, it decides which modules are imported: whoever can set it can run code in this process.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    if not text.startswith("{"):
        text = _read_file(text)
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ManifestError(f"expected {VARIABLE} to hold JSON, or the path of a file with it: {error}") from error
    return replay(found)


def _entry(receipt: Receipt) -> dict[str, Any]:
    patch, found = receipt.patch, receipt.verdict
    forced = found.kind == VerdictKind.OBSOLETE or found.probe_error is not None
    return {
        "id": patch.id,
        "target": patch.target,
        "module": patch.module,
        "reason": receipt.reason,
        "verdict": str(found),
        "versions": versions_of(patch),
        "options": {"force": forced, "count_calls": receipt.count_calls, "disabled": receipt.disabled},
    }


def _why_not(receipt: Receipt) -> str:
    if receipt.scope is not None:
        return f"it is limited to {receipt.scope_text} of this process"
    try:
        registered = REGISTRY.get(receipt.id)
    except UnknownPatchError:
        return "it is not registered, so its id leads nowhere"
    return "" if registered is receipt.patch else "another patch is registered under its id"


def _read(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = manifest.get("format")
    if found != _FORMAT:
        raise ManifestError(f"expected a manifest of format {_FORMAT}, as patches.manifest() makes it, found {found!r}")
    keys = {"id", "target", "module", "reason", "verdict", "versions", "options"}
    entries: list[dict[str, Any]] = list(manifest["patches"])
    for entry in entries:
        if keys - entry.keys():
            absent = ", ".join(sorted(keys - entry.keys()))
            raise ManifestError(f"an entry of the manifest lacks {absent}: {entry!r}; make it with patches.manifest()")
    return entries


def _read_file(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 - pathlib would be imported for this call alone
            return file.read()
    except OSError as error:
        raise ManifestError(f"{VARIABLE} names a file that cannot be read: {error}") from error


def _find(entry: Mapping[str, Any]) -> Patch:
    patch_id, module = entry["id"], entry["module"]
    try:
        return REGISTRY.get(patch_id)
    except UnknownPatchError as error:
        if module in _MAIN:
            raise ManifestError(
                f"{patch_id!r} is declared in the script of another process, which cannot be imported here; declare it "
                "in a module that both import"
            ) from error
    try:
        importlib.import_module(module)
        return REGISTRY.get(patch_id)
    except (ImportError, UnknownPatchError) as error:
        raise ManifestError(f"{patch_id!r} was declared by {module!r}, and is not here: {error}") from error


def _differences(entry: Mapping[str, Any], patch: Patch) -> Iterable[str]:
    versions = versions_of(patch)
    for name in sorted({*versions, *entry["versions"]}):
        there, here = entry["versions"].get(name, "absent"), versions.get(name, "absent")
        if there != here:
            yield f"{patch.id!r} was applied with {name} {there}, and here it is {here}"
    if entry["target"] != patch.target:
        yield f"{patch.id!r} had the target {entry['target']!r}, and here it has {patch.target!r}"
    found = verdict(patch)
    if entry["verdict"] != str(found):
        yield f"{patch.id!r} was {entry['verdict']}, and here it is {found}: {found.why}"


def _disable(receipts: Iterable[Receipt], entries: Mapping[str, Mapping[str, Any]]) -> None:
    disabled = [receipt for receipt in receipts if receipt.id in entries and entries[receipt.id]["options"]["disabled"]]
    if disabled:
        disable(*disabled)
