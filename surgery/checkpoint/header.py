"""The header of one safetensors file: parsed by us, and checked completely, before any weight is read.

Layout (https://github.com/huggingface/safetensors#format): eight bytes, a little-endian length N; N bytes of
JSON; then the tensors' bytes, back to back. The JSON maps a tensor's name to its dtype, shape and
`data_offsets`, which count from the end of the header. Being ours, the parser knows the absolute range of
every tensor, works on any source of bytes, and names the file and the tensor in each error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeGuard

import torch

from surgery.errors import CheckpointError

__all__ = [
    "LENGTH_BYTES",
    "MAX_HEADER_BYTES",
    "Header",
    "Stamp",
    "TensorEntry",
    "header_length",
    "parse_header",
    "parse_json",
    "read_header",
]

LENGTH_BYTES = 8

# The same limit as the reference implementation: a corrupt length must not become an allocation.
MAX_HEADER_BYTES = 100_000_000

# Digits of a number in JSON. The largest that a float can hold has 309.
MAX_DIGITS = 1000

# No file and no dimension of a tensor reaches this.
_TOO_LARGE = 1 << 63

# A clone without Git LFS has, in place of a large file, a text that begins with "version https://git-lfs".
_LFS_POINTER = b"version "

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "F8_E8M0": torch.float8_e8m0fnu,
        "C64": torch.complex64,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """The place of one tensor: the bytes `start` to `end` (exclusive) of `file`.

    unknown: the name of a dtype that torch does not have. Such a tensor is its bytes, uint8 of shape `(nbytes,)`, and
    fills no parameter.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    unknown: str | None = None

    @property
    def nbytes(self) -> int:
        """Size of the tensor, in memory and in the file."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Header:
    """The tensors of one file, in file order, and the free text of `__metadata__`.

    stamp: by which a change of the file is noticed; None where there is no file on this machine.
    """

    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    stamp: Stamp | None = None


def read_header(file: Path) -> Header:
    """Read and check the header of `file`; nothing behind the header is read.

    Raises `CheckpointError` if the file cannot be read, is truncated, or is not a valid safetensors file.
    """
    try:
        with file.open("rb") as stream:
            file_size = stream.seek(0, 2)
            stream.seek(0)
            prefix = stream.read(LENGTH_BYTES)
            raw = stream.read(header_length(prefix, file=file, file_size=file_size))
            stamp = Stamp.of(os.fstat(stream.fileno()), prefix + raw)
    except OSError as error:
        raise CheckpointError(f"Cannot read the checkpoint file {file}: {error}.", path=file) from error
    return replace(parse_header(raw, file=file, file_size=file_size), stamp=stamp)


def parse_header(raw: bytes, *, file: Path, file_size: int) -> Header:
    """Check the JSON part `raw` of a header against the size of its file, in bytes.

    Guarantees of the result: the tensors cover the bytes behind the header exactly, without overlap and
    without hole, and each range is as long as its dtype and shape need.
    Raises `CheckpointError`, naming the file and, where there is one, the tensor.
    """
    data_start = LENGTH_BYTES + len(raw)
    try:
        fields = parse_json(raw)
    except ValueError as error:
        raise _corrupt(file, f"its header is not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise _corrupt(file, f"its header should be a JSON object, found {type(fields).__name__}")
    metadata = _metadata(fields.pop("__metadata__", None), file=file)
    entries = [_entry(name, spec, file=file, data_start=data_start) for name, spec in fields.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    _check_ranges(entries, file=file, data_start=data_start, file_size=file_size)
    return Header(entries=tuple(entries), metadata=MappingProxyType(metadata))


def parse_json(raw: bytes) -> Any:
    """Parse JSON; a repeated key or an endless number is an error too, and every failure a `ValueError`."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _integer(digits: str) -> int:
    # Python's own limit can be switched off, and what it then takes is quadratic time.
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; the limit is {MAX_DIGITS}")
    return int(digits)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    ((repeated, _),) = Counter(key for key, _ in pairs).most_common(1)
    raise ValueError(f"the key {repeated!r} appears twice")


def header_length(prefix: bytes, *, file: Path, file_size: int) -> int:
    """Length of the JSON that follows `prefix`, the first `LENGTH_BYTES` of a file. Raises `CheckpointError`."""
    if len(prefix) < LENGTH_BYTES:
        raise _truncated(file, f"it has {file_size} bytes; the length of the header alone takes {LENGTH_BYTES}")
    if prefix == _LFS_POINTER:
        raise CheckpointError(
            f"The checkpoint file {file} is a Git LFS pointer. Get the weights with `git lfs pull`.", path=file
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise _corrupt(file, f"it announces a header of {length} bytes; the limit is {MAX_HEADER_BYTES}")
    if LENGTH_BYTES + length > file_size:
        raise _truncated(file, f"its header needs {LENGTH_BYTES + length} bytes, the file has {file_size}")
    return length


def _metadata(found: Any, *, file: Path) -> dict[str, str]:
    if found is None:
        return {}
    if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
        return found
    raise _corrupt(file, "its __metadata__ should map strings to strings")


def _entry(name: str, spec: Any, *, file: Path, data_start: int) -> TensorEntry:
    if not isinstance(spec, dict):
        raise _corrupt(file, f"its header should describe a tensor with an object, found {spec!r:.80}", name)
    stored, shape, offsets = spec.get("dtype"), spec.get("shape"), spec.get("data_offsets")
    if not isinstance(stored, str):
        raise _corrupt(file, f"its dtype should be a name, found {stored!r:.80}", name)
    if not _are_sizes(shape):
        raise _corrupt(file, f"its shape should be a list of sizes, found {shape!r:.80}", name)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _corrupt(file, f"its data_offsets should be [begin, end], found {offsets!r:.80}", name)
    begin, end = offsets
    dtype = DTYPES.get(stored)
    if dtype is None:
        dtype, shape = torch.uint8, [end - begin]
    needed = _elements(shape) * dtype.itemsize
    if end - begin != needed:
        wanted = f"{stored} of shape {shape!s:.80} needs {needed if needed < _TOO_LARGE else '2**63 or more'}"
        problem = f"its data_offsets cover {end - begin} bytes, {wanted}"
        raise _corrupt(file, problem, name)
    return TensorEntry(
        name=name,
        file=file,
        dtype=dtype,
        shape=tuple(shape),
        start=data_start + begin,
        end=data_start + end,
        unknown=None if stored in DTYPES else stored,
    )


def _are_sizes(found: Any) -> TypeGuard[list[int]]:
    # `type is int` and not isinstance: JSON's true is a bool, which is an int to Python.
    return isinstance(found, list) and all(type(size) is int and 0 <= size < _TOO_LARGE for size in found)


def _elements(shape: list[int]) -> int:
    """The product of `shape`, up to a limit that no tensor reaches: the whole product of many sizes takes minutes."""
    if 0 in shape:
        return 0
    product = 1
    for size in shape:
        product *= size
        if product >= _TOO_LARGE:
            break
    return product


def _check_ranges(entries: list[TensorEntry], *, file: Path, data_start: int, file_size: int) -> None:
    """Check that the sorted `entries` tile the bytes from `data_start` to `file_size`."""
    position = data_start
    for entry in entries:
        if entry.start < position:
            raise _corrupt(file, "its bytes overlap with those of the tensor before it", entry.name)
        if entry.start > position:
            raise _corrupt(file, f"{entry.start - position} bytes before it belong to no tensor", entry.name)
        if entry.end > file_size:
            raise _truncated(file, f"it ends at byte {entry.end}, the file has {file_size}", entry.name)
        position = entry.end
    if position != file_size:
        raise _corrupt(file, f"{file_size - position} bytes at its end belong to no tensor")


def _truncated(file: Path, problem: str, tensor: str | None = None) -> CheckpointError:
    return _corrupt(file, problem, tensor, verdict="is truncated")


def _corrupt(
    file: Path, problem: str, tensor: str | None = None, *, verdict: str = "is not a valid safetensors file"
) -> CheckpointError:
    subject = "" if tensor is None else f"tensor {tensor!r}: "
    message = f"The checkpoint file {file} {verdict}: {subject}{problem}. Download or save the file again."
    return CheckpointError(message, path=file, tensor=tensor)


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """Size in bytes, time of the last change in ns, inode and its device, and a digest of the first `header_bytes`."""

    size: int
    modified: int
    inode: int
    device: int
    header_bytes: int
    header: str

    @classmethod
    def of(cls, status: os.stat_result, header: bytes) -> Self:
        """The stamp of a file with this `status`, which begins with `header`."""
        return cls(
            size=status.st_size,
            modified=status.st_mtime_ns,
            inode=status.st_ino,
            device=status.st_dev,
            header_bytes=len(header),
            header=_digest(header),
        )

    def check(self, file: Path, descriptor: int) -> None:
        """Raise `CheckpointError` if `file`, open as `descriptor`, has changed; costs one `stat`, reads nothing."""
        try:
            found = file.stat()
        except OSError as error:
            raise _changed(file, str(error)) from error
        if found.st_size != self.size:
            raise _changed(file, f"it had {self.size} bytes, and has {found.st_size}")
        if found.st_mtime_ns != self.modified:
            raise _changed(file, f"it was written to at {found.st_mtime_ns} ns, last before that at {self.modified}")
        if {found.st_ino, os.fstat(descriptor).st_ino} != {self.inode}:
            raise _changed(file, "another file has taken its place")

    def check_header(self, file: Path, descriptor: int) -> None:
        """Call `check`, then read the header again and compare it."""
        self.check(file, descriptor)
        try:
            header = os.pread(descriptor, self.header_bytes, 0)
        except OSError as error:
            raise _changed(file, str(error)) from error
        if _digest(header) != self.header:
            raise _changed(file, "its header is another one")


def _digest(header: bytes) -> str:
    return hashlib.blake2b(header, digest_size=16).hexdigest()


def _changed(file: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint file {file} has changed since it was opened: {how}. Leave it alone while it is read; start "
        "again.",
        path=file,
    )
