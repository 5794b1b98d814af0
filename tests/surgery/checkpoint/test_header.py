"""The header parser: exact on valid files, and nothing but `CheckpointError` on any other bytes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from surgery.checkpoint.header import DTYPES, MAX_HEADER_BYTES, read_header
from surgery.errors import CheckpointError

VALID = save(
    {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)},
    {"format": "pt"},
)


def assemble(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def tensor(begin: int = 0, end: int = 4, **fields: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [begin, end], **fields}


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_found_where_it_was_written(tmp_path: Path, name: str) -> None:
    expected = torch.zeros(3, 2, dtype=DTYPES[name])
    file = tmp_path / "x.safetensors"
    file.write_bytes(save({"first": torch.zeros(1, dtype=torch.uint8), "second": expected}))

    entries = {entry.name: entry for entry in read_header(file).entries}

    entry = entries["second"]
    assert (entry.dtype, entry.shape, entry.numel, entry.file) == (expected.dtype, (3, 2), 6, file)
    assert entry.nbytes == expected.nbytes
    assert max(entry.end for entry in entries.values()) == file.stat().st_size


def test_metadata_scalars_and_empty_tensors(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(save({"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4)}, {"note": "kept"}))

    header = read_header(file)

    assert dict(header.metadata) == {"note": "kept"}
    assert {entry.name: (entry.shape, entry.nbytes) for entry in header.entries} == {
        "scalar": ((), 4),
        "empty": ((0, 4), 0),
    }


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "of another time"])
def test_a_tensor_of_an_unknown_dtype_is_its_bytes(tmp_path: Path, dtype: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(assemble({"a": tensor(), "b": tensor(4, 7, dtype=dtype, shape=[2, 3])}, bytes(7)))
    known, unknown = read_header(file).entries
    assert (known.unknown, unknown.unknown) == (None, dtype)
    assert (unknown.dtype, unknown.shape, unknown.start, unknown.end) == (torch.uint8, (3,), known.end, known.end + 3)


def test_metadata_may_be_null(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(assemble({"__metadata__": None, "a": tensor()}, bytes(4)))
    header = read_header(file)
    assert (dict(header.metadata), [entry.name for entry in header.entries]) == ({}, ["a"])


@pytest.mark.parametrize(
    ("content", "problem", "name"),
    [
        pytest.param(b"", "truncated", None, id="empty file"),
        pytest.param(b"\x01\x02", "truncated", None, id="no length"),
        pytest.param((500).to_bytes(8, "little") + b"{}", "truncated", None, id="header beyond the end"),
        pytest.param(
            (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
            "the limit is 100000000",
            None,
            id="huge header",
        ),
        pytest.param(pickled({"a": torch.ones(3)}), "not a valid safetensors file", None, id="a renamed pickle"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull", None, id="LFS pointer"),
        pytest.param(assemble(b"{not json"), "not valid JSON", None, id="not JSON"),
        pytest.param(assemble(b"\xff\xfe"), "not valid JSON", None, id="not UTF-8"),
        pytest.param(assemble(b"[" * 200_000), "nested too deeply", None, id="deep nesting"),
        pytest.param(assemble([1]), "should be a JSON object", None, id="a list"),
        pytest.param(assemble(b'{"a": {}, "a": {}}'), "'a' appears twice", None, id="repeated tensor"),
        pytest.param(assemble({"__metadata__": {"a": 1}}), "__metadata__", None, id="metadata of numbers"),
        pytest.param(assemble({"a": 3}), "describe a tensor with an object", "a", id="no object"),
        pytest.param(assemble({"a": tensor(dtype=["F32"])}, bytes(4)), "dtype should be a name", "a", id="dtype list"),
        pytest.param(assemble({"a": tensor(dtype=None)}, bytes(4)), "dtype should be a name", "a", id="no dtype"),
        pytest.param(assemble({"a": tensor(6, 2, dtype="F4")}, bytes(6)), "data_offsets", "a", id="reversed F4"),
        pytest.param(assemble({"a": tensor(dtype="F4")}, bytes(3)), "truncated", "a", id="F4 beyond the end"),
        pytest.param(assemble({"a": tensor(shape=[-1])}, bytes(4)), "shape", "a", id="negative size"),
        pytest.param(assemble({"a": tensor(shape=[True])}, bytes(4)), "shape", "a", id="boolean size"),
        pytest.param(assemble({"a": tensor(shape=None)}, bytes(4)), "shape", "a", id="no shape"),
        pytest.param(
            assemble({"a": tensor(shape=[2**62] * 300_000)}, bytes(4)), "needs 2**63 or more", "a", id="huge product"
        ),
        pytest.param(assemble({"a": tensor(shape=[10**900])}, bytes(4)), "list of sizes", "a", id="huge size"),
        pytest.param(assemble({"a": tensor(0, 10**999)}, bytes(4)), "data_offsets", "a", id="huge offset"),
        pytest.param(assemble({"a": tensor(shape=[float("nan")])}, bytes(4)), "list of sizes", "a", id="not a number"),
        pytest.param(assemble(b'{"a": {"shape": [' + b"1" * 5000 + b"]}}"), "5000 digits", None, id="digits"),
        pytest.param(assemble(b'{"a": ' + b"1" * 2**22 + b"}"), "4194304 digits", None, id="megabytes of digits"),
        pytest.param(assemble({"a": tensor(4, 0)}, bytes(4)), "data_offsets", "a", id="reversed"),
        pytest.param(assemble({"a": tensor(data_offsets=[0])}, bytes(4)), "data_offsets", "a", id="one offset"),
        pytest.param(assemble({"a": tensor(shape=[2])}, bytes(4)), "4 bytes, F32 of shape [2] needs 8", "a", id="size"),
        pytest.param(assemble({"a": tensor()}, bytes(3)), "truncated", "a", id="data beyond the end"),
        pytest.param(assemble({"a": tensor(), "b": tensor(2, 6)}, bytes(6)), "overlap", "b", id="overlap"),
        pytest.param(assemble({"a": tensor(), "b": tensor(6, 10)}, bytes(10)), "no tensor", "b", id="hole"),
        pytest.param(assemble({"a": tensor()}, bytes(6)), "2 bytes at its end", None, id="bytes left over"),
    ],
)
def test_a_bad_file_is_named_with_its_tensor(tmp_path: Path, content: bytes, problem: str, name: str | None) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)

    with pytest.raises(CheckpointError) as caught:
        read_header(file)

    assert problem in str(caught.value)
    assert str(file) in str(caught.value)
    assert name is None or repr(name) in str(caught.value)
    assert (caught.value.path, caught.value.tensor) == (file, name)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Cannot read .*absent\.safetensors") as caught:
        read_header(tmp_path / "absent.safetensors")

    assert isinstance(caught.value.__cause__, FileNotFoundError)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    flips=st.dictionaries(st.integers(0, len(VALID) - 1), st.integers(0, 255), max_size=8),
    length=st.integers(0, len(VALID)),
)
def test_damaged_files_raise_nothing_but_checkpoint_error(tmp_path: Path, flips: dict[int, int], length: int) -> None:
    damaged = bytearray(VALID)
    for position, value in flips.items():
        damaged[position] = value
    file = tmp_path / "damaged.safetensors"
    file.write_bytes(damaged[:length])

    try:
        header = read_header(file)
    except CheckpointError:
        return

    # What is accepted keeps the promise: the tensors cover the rest of the file exactly.
    assert sum(entry.nbytes for entry in header.entries) == length - min(
        (entry.start for entry in header.entries), default=length
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("F32"),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner)
        ),
        max_leaves=12,
    ),
    size=st.integers(0, 16),
)
def test_any_json_raises_nothing_but_checkpoint_error(tmp_path: Path, header: object, size: int) -> None:
    file = tmp_path / "any.safetensors"
    file.write_bytes(assemble(header, bytes(size)))

    try:
        entries = read_header(file).entries
    except CheckpointError:
        return

    assert sum(entry.nbytes for entry in entries) == size
