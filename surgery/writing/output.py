"""The output of a job that writes a checkpoint: a folder that is whole or absent, written by all ranks, resumed.

Names, dtypes and shapes are known before the first write, so that every tensor has its place in its file from the
start, and any number of ranks writes the same bytes. All is written into a hidden folder beside the output:

    .OUT.surgery/new/           the files of the output, at their full size
    .OUT.surgery/job            digest of what is written: another job begins anew
    .OUT.surgery/journal.*      parts of tensors that are on the disk, by rank; a job that was killed goes on from there
    .OUT.surgery/old/           the previous output, between the two renames that replace it

The journal is written behind the data that it is about. One rename of `new/` makes the output; until then nothing in
its place changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Self

import torch

from surgery.adapters.place import LOCK, allocate, locked
from surgery.checkpoint.header import DTYPES, LENGTH_BYTES
from surgery.checkpoint.layout import INDEX_NAME, SINGLE_NAME
from surgery.comm.comparison import facts_of, same_on_every_rank
from surgery.comm.failures import everyone
from surgery.comm.ranks import Ranks, current_ranks
from surgery.errors import ConfigError, ExportError
from surgery.telemetry.atomic import sync, write_whole

__all__ = ["MAX_SHARD_BYTES", "STATE_BYTES", "Output", "Planned", "check_output", "output"]

#: Bytes of a file: the default of `save_pretrained`, and the Hub's recommendation.
MAX_SHARD_BYTES = 5_000_000_000

#: Most bytes of a tensor whose length is known only with its values; bitsandbytes' state takes some 170.
STATE_BYTES = 512

#: A rank brings what it has written to the disk, and into its journal, after so many bytes, or seconds.
FLUSH_BYTES, FLUSH_SECONDS = 256 << 20, 2.0

#: Bytes that are compared at a time.
CHECKED_BYTES = 64 << 20

NAMES = {dtype: name for name, dtype in DTYPES.items()}

NEW, OLD, JOB, JOURNAL = "new", "old", "job", "journal"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One tensor of the output.

    shape: None for a text of at most `STATE_BYTES` bytes, as uint8, whose length depends on values.
    """

    name: str
    dtype: torch.dtype = torch.uint8
    shape: tuple[int, ...] | None

    @property
    def numel(self) -> int:
        """Number of elements; of a text the most that it may have."""
        return STATE_BYTES if self.shape is None else math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in the file; of a text the most that it may have."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class _File:
    """One file of the output: its tensors in the order of their bytes, texts last."""

    name: str
    tensors: tuple[Planned, ...] = field(repr=False)

    @cached_property
    def start(self) -> int:
        """Offset of the first tensor: behind the longest header that the file may have, at a multiple of 8."""
        sizes = {planned.name: planned.nbytes for planned in self.tensors}
        return -(-(LENGTH_BYTES + len(self.fields(sizes))) // 8) * 8

    @cached_property
    def places(self) -> dict[str, int]:
        """Offset in the file of every tensor; texts each have the room of the longest."""
        ends = accumulate((planned.nbytes for planned in self.tensors), initial=self.start)
        return {planned.name: place for planned, place in zip(self.tensors, ends, strict=False)}

    @property
    def size(self) -> int:
        """The most bytes that it may have."""
        return self.start + sum(planned.nbytes for planned in self.tensors)

    @property
    def end(self) -> int:
        """Offset of the first text, behind all tensors of known length."""
        return self.start + sum(planned.nbytes for planned in self.tensors if planned.shape is not None)

    def fields(self, sizes: Mapping[str, int]) -> bytes:
        """The JSON of the header, where tensors have so many bytes."""
        ends = list(accumulate((sizes[planned.name] for planned in self.tensors), initial=0))
        described = {
            planned.name: {
                "dtype": NAMES[planned.dtype],
                "shape": [sizes[planned.name]] if planned.shape is None else list(planned.shape),
                "data_offsets": [ends[number], ends[number + 1]],
            }
            for number, planned in enumerate(self.tensors)
        }
        return json.dumps({"__metadata__": {"format": "pt"}, **described}, separators=(",", ":")).encode()

    def header(self, sizes: Mapping[str, int]) -> bytes:
        """The header with its length before it, and spaces up to where tensors begin."""
        return (self.start - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little") + self.fields(sizes).ljust(
            self.start - LENGTH_BYTES
        )


def _lay_out(planned: Iterable[Planned], max_shard_bytes: int) -> tuple[_File, ...]:
    """The files of the output: as many tensors to each as fit, in their order; one that is larger has its own."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for each in planned:
        if shards[-1] and size + each.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(each)
        size += each.nbytes
    count = len(shards)
    names = [SINGLE_NAME] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    # Wide elements first, so that all are aligned, as safetensors writes them.
    return tuple(
        _File(
            name=name,
            tensors=tuple(sorted(shard, key=lambda each: (each.shape is None, -each.dtype.itemsize))),
        )
        for name, shard in zip(names, shards, strict=True)
    )


@contextmanager
def output(
    directory: str | os.PathLike[str],
    planned: Sequence[Planned],
    *,
    job: str,
    ranks: Ranks,
    device: torch.device,
    files: Mapping[str, bytes | Path],
    overwrite: bool = False,
    source: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Iterator[Output]:
    """Write a checkpoint to `directory` in a block, to be entered on all ranks alike; at its end it is there, whole.

    Ranks meet at the beginning and at the end, and nowhere between. If the block raises, or its process is killed,
    nothing in the place of `directory` has changed, and the same job goes on with what is written already, with
    another number of ranks too. On several hosts `directory` is on a file system that all of them share.

    Args:
        directory: the new folder; links are followed.
        planned: all tensors, in the order of the files, the same on all ranks.
        job: text, or a digest of it, of all that the values depend on: source, options, versions.
        ranks: of the job.
        device: what their process group speaks.
        files: what else is in the folder, by names that may have a folder before them; a path is copied.
        overwrite: whether a folder of a checkpoint that is there may be replaced, with all that is in it.
        source: a folder that is read, which may not be replaced.
        max_shard_bytes: most bytes of a file, if no single tensor is larger.

    Raises:
        ConfigError: the folder cannot be written, another job writes it, or there is something that may not be
            replaced; before anything is written.
        ExportError: the disk is full, or fails, or a tensor was not written whole.
        PeerError: on the other ranks.
    """
    target = Path(os.path.realpath(directory))
    given = facts_of({"folder": target, "job": job, "overwrite": overwrite, "most bytes of a file": max_shard_bytes})
    same_on_every_rank(current_ranks(), "output", {"output": given}, device=device)
    _check_planned(planned, max_shard_bytes, files)
    laid_out = _lay_out(planned, max_shard_bytes)
    hidden = _hidden(target)
    with ExitStack() as stack:
        with everyone(ranks, device=device):
            if ranks.rank == 0:
                check_output(directory, overwrite=overwrite, source=source)
                stack.enter_context(_held(target, overwrite=overwrite, source=source))
                _begin(hidden, laid_out, job)
        with everyone(ranks, device=device):
            out = stack.enter_context(Output(target=target, files=laid_out, rank=ranks.rank))
        yield out
        with everyone(ranks, device=device):
            out.flush()
        with everyone(ranks, device=device):
            if ranks.rank == 0:
                out.publish(files, overwrite=overwrite)


class Output:
    """The output as one rank writes it; see `output`."""

    def __init__(self, *, target: Path, files: Sequence[_File], rank: int) -> None:
        self.target = target
        self.rank = rank
        self._hidden = _hidden(target)
        self._files = files
        self._planned = {planned.name: (file, planned) for file in files for planned in file.tensors}
        self._descriptors: dict[str, int] = {}
        self._pending: list[tuple[str, int, int] | tuple[str, str]] = []
        self._pending_bytes, self._flushed = 0, time.monotonic()
        if not (self._hidden / JOB).is_file():
            raise ConfigError(
                f"expected the folder {self._hidden}, which rank 0 has made, on rank {rank}, found none: give an "
                "output on a file system that all hosts share"
            )
        self._done, _ = _read_journals(self._hidden, files)

    def is_done(self, *names: str) -> bool:
        """Whether all these tensors were written by an earlier run of the job; the same answer on all ranks."""
        return self._done.issuperset(names)

    def write(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Write `tensor`, of any shape and on any device, as the elements of `name` from `start` on.

        Raises `ValueError` for another dtype than planned, or what is outside of it, and `ExportError`.
        """
        file, planned = self._planned[name]
        stop = start + tensor.numel()
        if planned.shape is None or tensor.dtype != planned.dtype or not 0 <= start <= stop <= planned.numel:
            raise ValueError(
                f"expected elements of {name}, {planned.dtype} {planned.shape}; found {tensor.dtype}, {start} to {stop}"
            )
        data = _bytes(tensor)
        with self._naming_failure():
            _pwrite(self._descriptor(file), data, file.places[name] + start * planned.dtype.itemsize)
        self._note(name, start, stop)
        self._pending_bytes += len(data)
        if self._pending_bytes > FLUSH_BYTES or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def write_state(self, name: str, text: str) -> None:
        """Give `name`, which was planned without a shape, its bytes: JSON, say. One rank does, or all do alike."""
        _, planned = self._planned[name]
        if planned.shape is not None or not 0 < len(text.encode()) <= STATE_BYTES:
            raise ValueError(f"expected a text of up to {STATE_BYTES} bytes for {name}; found {text!r:.200}")
        self._pending.append((name, text))

    def check(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Compare `tensor` with what is on the disk, where `write` would put it. Raises `ExportError`."""
        file, planned = self._planned[name]
        expected = _bytes(tensor)
        place = file.places[name] + start * planned.dtype.itemsize
        for done in range(0, len(expected), CHECKED_BYTES):
            part = expected[done : done + CHECKED_BYTES]
            with self._naming_failure():
                found = os.pread(self._descriptor(file), len(part), place + done)
            if found != part:
                raise ExportError(
                    f"{name} is not as it was written, in {self._hidden / NEW / file.name}, near byte {place + done}: "
                    f"look after the disk, remove {self._hidden}, and run again"
                )

    def check_state(self, name: str, text: str) -> None:
        """Compare `text` with what `write_state` was given, on any rank. Raises `ExportError`."""
        if self._written.get(name) != text.encode():
            raise ExportError(f"{name} is not as it was written: expected {text}, found {self._written.get(name)!r}")

    @cached_property
    def _written(self) -> dict[str, bytes]:
        """The texts in the journals of all ranks, which are not read before all have left `flush`."""
        return _read_journals(self._hidden, self._files)[1]

    def flush(self) -> None:
        """Bring what this rank has written to the disk, then say so in its journal."""
        self._flushed, self._pending_bytes = time.monotonic(), 0
        if not self._pending:
            return
        with self._naming_failure():
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
            lines = "".join(json.dumps(entry) + "\n" for entry in self._pending)
            with (self._hidden / f"{JOURNAL}.{self.rank}").open("a", encoding="ascii") as journal:
                journal.write(lines)
                journal.flush()
                os.fsync(journal.fileno())
        self._pending = []

    def publish(self, files: Mapping[str, bytes | Path], *, overwrite: bool) -> None:
        """Complete the files that all ranks have written, add the others, and give the folder its name."""
        done, states = _read_journals(self._hidden, self._files)
        missing = [name for name in self._planned if name not in done]
        if missing:
            raise ExportError(f"{len(missing)} tensors of {self.target} were not written whole, {missing[0]} the first")
        with self._naming_failure():
            for file in self._files:
                self._complete(file, states)
            if len(self._files) > 1:
                _write(self._hidden / NEW / INDEX_NAME, _index(self._files, states))
            for name, content in files.items():
                _write(self._hidden / NEW / name, content)
            for folder in {(self._hidden / NEW / name).parent for name in (SINGLE_NAME, *files)}:
                sync(folder)
            self._rename(overwrite=overwrite)

    def _complete(self, file: _File, states: Mapping[str, bytes]) -> None:
        """Write the texts of `file`, whose lengths are known by now, and its header."""
        descriptor = self._descriptor(file)
        texts = [planned.name for planned in file.tensors if planned.shape is None]
        joined = b"".join(states[name] for name in texts)
        _pwrite(descriptor, memoryview(joined), file.end)
        _pwrite(descriptor, memoryview(file.header(_sizes(file, states))), 0)
        os.ftruncate(descriptor, file.end + len(joined))
        os.fsync(descriptor)

    def _rename(self, *, overwrite: bool) -> None:
        new, old = self._hidden / NEW, self._hidden / OLD
        if overwrite and self.target.exists():
            self.target.rename(old)
        try:
            new.rename(self.target)
        except OSError:
            _settle(self._hidden, self.target)
            raise
        sync(self.target.parent)

    def _note(self, name: str, start: int, stop: int) -> None:
        last = self._pending[-1] if self._pending else ("", 0, 0)
        if len(last) == 3 and last[0] == name and last[2] == start:
            self._pending[-1] = (name, last[1], stop)
        else:
            self._pending.append((name, start, stop))

    def _descriptor(self, file: _File) -> int:
        if file.name not in self._descriptors:
            self._descriptors[file.name] = os.open(self._hidden / NEW / file.name, os.O_RDWR | os.O_CLOEXEC)
        return self._descriptors[file.name]

    @contextmanager
    def _naming_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ExportError(
                f"{self.target} cannot be written: {error.strerror or error}. What was in its place is as it was; "
                f"what is written by now is in {self._hidden}: mend that and run the same again to go on, or remove it"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with suppress(ExportError):
                self.flush()
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def check_output(directory: str | os.PathLike[str], *, overwrite: bool, source: Path | None = None) -> Path:
    """The real path of an output, that nothing keeps from being written as far as can be seen without writing.

    Raises `ConfigError` if there is something that may not be replaced.
    """
    target = Path(os.path.realpath(directory))
    try:
        problem = _problem(target, overwrite=overwrite, source=source) if os.fspath(directory) else "its path is empty"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem is not None:
        raise ConfigError(f"the output {target} cannot be written: {problem}; choose another output")
    return target


def _problem(target: Path, *, overwrite: bool, source: Path | None) -> str | None:
    """The reason why `target` may not be made, or replaced; None if it may."""
    if source is not None and target == Path(os.path.realpath(source)):
        return "it is the folder that is read"
    if target.exists() and not target.is_dir():
        return "it is a file"
    there = sorted(target.iterdir()) if target.exists() else []
    if os.path.ismount(target) or target == Path.cwd():
        return "it is a mount point, or the current folder, and no folder can be renamed to that, but to one in it"
    if there and not overwrite:
        return f"it is there, and {there[0].name} in it; --overwrite replaces a checkpoint with all in its folder"
    return _why_no_checkpoint(there)


def _why_no_checkpoint(there: Sequence[Path]) -> str | None:
    """The reason why a folder with this in it may not be replaced: somebody's home, because of a mistyped path, say."""
    if there and not any(path.suffix == ".safetensors" for path in there):
        return f"a checkpoint may be replaced, and there is no *.safetensors in it ({there[0].name})"
    folders = [path.name for path in there if path.is_dir() and path.name not in _REPLACED]
    return f"a checkpoint may be replaced, and the folder {folders[0]} is in it" if folders else None


#: Folders that a checkpoint may have in it: of templates, and what huggingface_hub keeps of a download.
_REPLACED = ("additional_chat_templates", ".cache")


def _hidden(target: Path) -> Path:
    return target.with_name(f".{target.name}.surgery")


@contextmanager
def _held(target: Path, *, overwrite: bool, source: Path | None) -> Iterator[None]:
    """Hold the output for a block, against other jobs. Raises `ConfigError`."""
    hidden = _hidden(target)
    with ExitStack() as stack:
        try:
            hidden.mkdir(parents=True, exist_ok=True)
            stack.callback(_leave, hidden)
            stack.enter_context(locked(hidden))
            _settle(hidden, target)
        except OSError as error:
            raise ConfigError(
                f"the output {target} cannot be written: {error.strerror or error} ({hidden}); choose another output, "
                "or mend that"
            ) from error
        # Once more: another job may have written it since.
        check_output(target, overwrite=overwrite, source=source)
        yield
        if not (hidden / NEW).exists():
            _clear(hidden)


def _settle(hidden: Path, target: Path) -> None:
    """Put the previous output back, or remove it, as the job that was replacing it has been stopped."""
    if not (hidden / OLD).exists():
        return
    if target.exists():
        shutil.rmtree(hidden / OLD)
    else:
        (hidden / OLD).rename(target)


def _leave(hidden: Path) -> None:
    with suppress(OSError):  # a job that is to go on has something in it
        hidden.rmdir()


def _clear(hidden: Path) -> None:
    """Remove all but the lock."""
    for path in hidden.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _begin(hidden: Path, files: Sequence[_File], job: str) -> None:
    """Make the files at their full size, or find those of an earlier run of the job. Raises `ConfigError`."""
    what = json.dumps([job, [[file.name, file.fields(_sizes(file, {})).decode()] for file in files]])
    digest = hashlib.blake2b(what.encode(), digest_size=16).hexdigest()
    goes_on = _goes_on(hidden, files, digest)
    try:
        if not goes_on:
            _clear(hidden)
            (hidden / NEW).mkdir()
        for file in files:
            descriptor = os.open(hidden / NEW / file.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            with contextlib.closing(os.fdopen(descriptor)):
                allocate(descriptor, file.size)
        done, states = _read_journals(hidden, files)
        sizes = {planned.name: planned.numel for file in files for planned in file.tensors if planned.shape is not None}
        entries = [[name, states[name].decode()] if name in states else [name, 0, sizes[name]] for name in sorted(done)]
        write_whole(hidden / JOURNAL, "".join(json.dumps(entry) + "\n" for entry in entries))
        for journal in hidden.glob(f"{JOURNAL}.*"):
            journal.unlink()
        write_whole(hidden / JOB, digest)
    except OSError as error:
        free, needed = shutil.disk_usage(hidden).free, sum(file.size for file in files)
        if not goes_on:
            _clear(hidden)
        raise ConfigError(
            f"the output needs {needed:,} bytes in {hidden}, found {free:,} free ({error.strerror or error}); "
            "choose another output, or make room"
        ) from error


def _goes_on(hidden: Path, files: Sequence[_File], digest: str) -> bool:
    """Whether an earlier run of the same job has left all files, with room for their tensors."""
    try:
        found = (hidden / JOB).read_text(encoding="ascii")
        return found == digest and all((hidden / NEW / file.name).stat().st_size >= file.end for file in files)
    except (OSError, ValueError):
        return False


def _read_journals(hidden: Path, files: Sequence[_File]) -> tuple[frozenset[str], dict[str, bytes]]:
    """Names of what is whole on the disk, and the texts."""
    parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    states: dict[str, bytes] = {}
    for journal in [hidden / JOURNAL, *sorted(hidden.glob(f"{JOURNAL}.*"))]:
        lines = journal.read_text(encoding="ascii").splitlines() if journal.exists() else []
        for line in lines:
            with suppress(ValueError):  # the last one, of a rank that was killed
                name, *rest = json.loads(line)
                if isinstance(rest[0], str):
                    states[name] = rest[0].encode()
                else:
                    parts[name].append((rest[0], rest[1]))
    whole = {
        planned.name
        for file in files
        for planned in file.tensors
        if (planned.name in states if planned.shape is None else _covers(parts[planned.name], planned.numel))
    }
    return frozenset(whole), states


def _covers(parts: Iterable[tuple[int, int]], numel: int) -> bool:
    reached = 0
    for start, stop in sorted(parts):
        if start > reached:
            return False
        reached = max(reached, stop)
    return reached >= numel


def _sizes(file: _File, states: Mapping[str, bytes]) -> dict[str, int]:
    """Bytes of every tensor; a text that is not known has the most that it may have."""
    return {each.name: len(states[each.name]) if each.name in states else each.nbytes for each in file.tensors}


def _index(files: Sequence[_File], states: Mapping[str, bytes]) -> bytes:
    sizes = {name: size for file in files for name, size in _sizes(file, states).items()}
    weight_map = {planned.name: file.name for file in files for planned in file.tensors}
    content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def _check_planned(planned: Sequence[Planned], max_shard_bytes: int, files: Iterable[str]) -> None:
    if max_shard_bytes <= 0:
        raise ConfigError(f"expected max_shard_bytes to be above 0, found {max_shard_bytes}")
    if not planned:
        raise ConfigError("expected at least one tensor to write, found none")
    names = [each.name for each in planned]
    assert len(set(names)) == len(names), "each name once"
    assert not any(Path(name).is_absolute() or ".." in Path(name).parts for name in files), "inside of the folder"


def _write(path: Path, content: bytes | Path) -> None:
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content)
    sync(path)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of `tensor`, which is copied only where it is on a device or not contiguous."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def _pwrite(descriptor: int, data: memoryview, place: int) -> None:
    done = 0
    # One call moves at most 2 GiB on Linux.
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], place + done)
