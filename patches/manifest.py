"""Manifests: the patches of one process as data, to be applied again in another, or compared with by a lock file.

A newly started worker (multiprocessing's `spawn`, Ray, a launcher) has none of its parent's patches:

    environment["PATCHES_MANIFEST"] = json.dumps(patches.manifest())       # in the parent
    patches.replay_from_environment()                                      # first thing in the worker
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

from .activation import ACTIVATIONS
from .errors import ManifestError, TargetError, UnknownPatchError
from .ledger import Receipt
from .patch import Patch
from .plan import Item, Verdict, VerdictKind, expand, fingerprint_of, verdict
from .registry import REGISTRY, select
from .transaction import Transaction, transaction
from .undo import active, disable
from .versions import installed_version, owner_of

__all__ = [
    "VARIABLE", "active_set", "changes", "digest", "lock", "manifest", "read", "replay", "replay_from_environment",
    "write",
]  # fmt: skip

VARIABLE: Final = "PATCHES_MANIFEST"
_FORMAT: Final = 2
_KEYS: Final = frozenset(("id", "target", "module", "reason", "verdict", "versions", "options"))
_MAIN: Final = ("__main__", "__mp_main__")


def active_set() -> tuple[str, ...]:
    """List each patch that acts on the whole process as one line: id, target, versions. Sorted, without duplicates.

    Patches that are limited to instances are left out: they end when the instances are garbage-collected, which
    happens at different times even in equal processes.
    """
    process_wide = {receipt.patch for receipt in active() if receipt.scope is None and not receipt.disabled}
    return tuple(sorted({_line(patch) for patch in process_wide}))


def digest() -> str:
    """Hash the active set to hexadecimal digits, equal in processes with the same patches.

    The order of application does not matter. Ids and targets do, and the versions of patches and patched libraries.
    """
    from hashlib import sha256

    return sha256("\n".join(active_set()).encode()).hexdigest()


def manifest() -> dict[str, Any]:
    """The active and the pending patches, for `json.dumps`: `patches`, in order, and `not_replayable`, with reasons.

    Not replayable are patches that are limited to instances, which another process does not have, and patches that are
    not registered, and so cannot be found by id.
    """
    with_grounds = [(receipt, _why_not(receipt)) for receipt in _in_force()]
    entries = {receipt.id: _entry_of(receipt) for receipt, why in with_grounds if not why}
    left_out = [{"id": receipt.id, "target": receipt.target, "why": why} for receipt, why in with_grounds if why]
    return {"format": _FORMAT, "patches": list(entries.values()), "not_replayable": left_out}


def replay(manifest: Mapping[str, Any]) -> Transaction:
    """Apply and commit all patches of a manifest, or none; returns the transaction. Pending ones are deferred again.

    Patches that are active already, as in a forked child, are not applied again. For an unknown id, the module that
    defines the wrapper is imported, which should register it. Raises ManifestError, before anything is changed, if a
    version, a target, a verdict, or a fingerprint differs from the manifest.
    """
    known = {receipt.id for receipt in _in_force() if receipt.scope is None}
    missing = {entry["id"]: entry for entry in _entries(manifest) if entry["id"] not in known}
    found = [(entry, _find(entry)) for entry in missing.values()]
    moved = [f"{patch.id!r}: {version}" for entry, patch in found for version in _moved(entry, patch)]
    differences = moved + [line for entry, patch in found for line in _differences(entry, patch)]
    if differences:
        raise ManifestError(
            f"this process differs from that of the manifest: {'; '.join(differences)}; nothing was applied. "
            "Install the same versions, or make a new manifest",
            differences=differences,
        )
    reason = f"replayed: {'; '.join(dict.fromkeys(entry['reason'] for entry in missing.values())) or 'nothing new'}"
    options = {patch_id: entry["options"] for patch_id, entry in missing.items()}
    force, count_calls = (any(each[name] for each in options.values()) for name in ("force", "count_calls"))
    # The modules of those that were not deferred have been imported, to compare the verdicts.
    with transaction(*missing, reason=reason, deferred=True, force=force, count_calls=count_calls) as done:
        disable(*(receipt for receipt in done.receipts if options.get(receipt.id, {}).get("disabled")))
        done.commit()
    return done


def replay_from_environment() -> Transaction | None:
    """Replay the manifest in `PATCHES_MANIFEST`, JSON or the path of a JSON file; returns None if it is not set.

    Like PYTHONPATH, it decides which modules are imported: whoever can set it can run code in this process.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    return replay(_parse(text, VARIABLE) if text.startswith("{") else read(text))


def lock(*items: Item) -> dict[str, Any]:
    """A manifest with the fingerprint of each target, to be compared with later: of these patches and what they need,
    as they would be applied now, or of those in force. Sorted by id, so that two can be told apart line by line.

    Imports the libraries. Raises ManifestError if there is nothing to lock.
    """
    found = manifest()
    if items:
        named = [_entry(patch, verdict(patch)) for patch, _ in expand(items)]
        found = {**found, "patches": named, "not_replayable": []}
    if not found["patches"]:
        raise ManifestError("expected patches to lock, found none in force; name some, or import what applies them")
    entries = {entry["id"]: _locked(entry) for entry in found["patches"]}
    return {**found, "patches": [entries[patch_id] for patch_id in sorted(entries)]}


def changes(locked: Mapping[str, Any], *selectors: str) -> list[str]:
    """The differences between a lock and this environment, each a line that says what to do.

    Every locked patch is looked at; with selectors, it is a difference too if one of their patches is not locked.
    """
    entries, lines, moved = _entries(locked), list[str](), dict[str, list[str]]()
    for entry in entries:
        try:
            patch = _find(entry)
        except ManifestError as error:
            lines.append(f"{error}; lock again without it, if it is not used any more")
            continue
        for version in _moved(entry, patch):
            moved.setdefault(version, []).append(repr(patch.id))
        lines += _differences(entry, patch)
    lines[:0] = [f"{version}; test {', '.join(ids)} with it, then lock again" for version, ids in moved.items()]
    unlocked = set(select(*selectors)) - {entry["id"] for entry in entries}
    return lines + [f"{patch_id!r} is not in the lock; lock again with it" for patch_id in sorted(unlocked)]


def write(manifest: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a manifest or lock as JSON with sorted keys, whole or not at all; a link is followed."""
    import json
    import tempfile
    from pathlib import Path

    place = Path(path).resolve()
    mode = place.stat().st_mode & 0o777 if place.exists() else 0o644
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    try:
        descriptor, name = tempfile.mkstemp(dir=place.parent, prefix=place.name)
    except OSError as error:
        raise ManifestError(f"expected a place to write to, and {str(path)!r} is none: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(mode)
        Path(name).replace(place)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The manifest or lock in a file. Raises ManifestError."""
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 - pathlib would be imported for this call alone
            return _parse(file.read(), path)
    except (OSError, ValueError) as error:
        raise ManifestError(f"expected a file with a manifest, and it cannot be read: {error}") from error


def _parse(text: str, source: object) -> Mapping[str, Any]:
    import json

    try:
        return cast("Mapping[str, Any]", json.loads(text))
    except ValueError as error:
        raise ManifestError(f"expected {source} to hold JSON, or the path of a file with it: {error}") from error


def _in_force() -> list[Receipt]:
    active()  # notices what has been imported, and has gone
    return ACTIVATIONS.in_force()


def _entry_of(receipt: Receipt) -> dict[str, Any]:
    found, pending = receipt.verdict, ACTIVATIONS.pending
    forced = found.kind == VerdictKind.OBSOLETE or found.probe_error is not None or pending.is_forced(receipt)
    waits = receipt in pending.receipts()
    options = {"force": forced, "count_calls": receipt.count_calls, "disabled": receipt.disabled, "deferred": waits}
    return {**_entry(receipt.patch, found), "reason": receipt.reason, "options": options}


def _entry(patch: Patch, found: Verdict) -> dict[str, Any]:
    return {
        "id": patch.id,
        "target": patch.target,
        "module": patch.module,
        "reason": patch.reason,
        "verdict": str(found),
        "versions": _versions(patch),
        "options": dict.fromkeys(("force", "count_calls", "disabled", "deferred"), False),
    }


def _locked(entry: Mapping[str, Any]) -> dict[str, Any]:
    patch = REGISTRY.get(entry["id"])
    # Not that of an active patch, whose probe would see its effect.
    found = str(verdict(patch)) if entry["options"]["deferred"] else entry["verdict"]
    return {**entry, "verdict": found, "fingerprint": _fingerprint(patch)}


def _versions(patch: Patch) -> dict[str, str]:
    """Distribution -> installed version, of the patch's own distribution, of its target, and of its requirements."""
    owners = (owner_of(module) for module in (patch.module, patch.targets[0].module))
    versions = dict(owner.split(" ", 1) for owner in owners if " " in owner)
    versions.update({name: installed_version(name) or "not installed" for name in patch.requires})
    return dict(sorted(versions.items()))


def _line(patch: Patch) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in _versions(patch).items())
    return f"{patch.id} {patch.target} [{versions}]"


def _fingerprint(patch: Patch) -> str:
    try:
        return fingerprint_of(patch)
    except TargetError:
        return ""  # it has no source, or is not there, of which the verdict tells


def _why_not(receipt: Receipt) -> str:
    if receipt.scope is not None:
        return f"it is limited to {receipt.scope_text} of this process"
    try:
        registered = REGISTRY.get(receipt.id)
    except UnknownPatchError:
        return "it is not registered, so its id leads nowhere"
    return "" if registered is receipt.patch else "another patch is registered under its id"


def _entries(manifest: Any) -> list[dict[str, Any]]:
    found = f"format {manifest.get('format')!r}" if isinstance(manifest, Mapping) else repr(manifest)
    if found != f"format {_FORMAT}" or not isinstance(manifest.get("patches"), list):
        raise ManifestError(f"expected a manifest of format {_FORMAT}, as patches lock makes it, found {found}")
    entries: list[Any] = manifest["patches"]
    for entry in entries:
        absent = ", ".join(sorted(_KEYS - entry.keys() if isinstance(entry, Mapping) else _KEYS))
        if absent:
            raise ManifestError(f"an entry of the manifest lacks {absent}: {entry!r}; make it with patches.manifest()")
    return entries


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


def _moved(entry: Mapping[str, Any], patch: Patch) -> Iterator[str]:
    versions = _versions(patch)
    for name in sorted({*versions, *entry["versions"]}):
        there, here = (found.get(name, "not installed") for found in (entry["versions"], versions))
        if there != here:
            yield f"{name} was {there}, and here it is {here}"


def _differences(entry: Mapping[str, Any], patch: Patch) -> Iterator[str]:
    if entry["target"] != patch.target:
        had = f"{patch.id!r} had the target {entry['target']!r}, and here it has {patch.target!r}"
        yield f"{had}; lock again if that is meant"
    if "fingerprint" in entry or not entry["options"]["deferred"]:  # or else it had no verdict yet
        yield from _differing_verdict(entry, patch)


def _differing_verdict(entry: Mapping[str, Any], patch: Patch) -> Iterator[str]:
    found = verdict(patch)
    if entry["verdict"] != str(found):
        first = "remove the patch, or" if found.kind == VerdictKind.OBSOLETE else "adapt it, then"
        yield f"{patch.id!r} was {entry['verdict']}, and here it is {found}: {found.why}; {first} lock again"
    here = _fingerprint(patch) if "fingerprint" in entry else ""
    if entry.get("fingerprint", "") != here and (here or entry["verdict"] == str(found)):
        targets = " or ".join(map(str, patch.targets))
        moved = f"the source of {targets!r} had the fingerprint {entry['fingerprint'] or 'none'}"
        advice = "read what has changed, adapt the patch to it, then lock again"
        yield f"{patch.id!r}: {moved}, and here {here or 'none'}; {advice}"
