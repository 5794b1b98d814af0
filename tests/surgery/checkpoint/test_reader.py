"""Reading: the right bytes, no others, from any number of threads, and an error that names the tensor."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from surgery.checkpoint.header import DTYPES
from surgery.checkpoint.index import Index
from surgery.checkpoint.reader import Reader
from surgery.errors import CheckpointError, WeightsMismatchError


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits, NaN patterns among them; zeros and ones for bool, which has no others."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).view(shape)


TENSORS = {
    **{name: random_tensor(dtype, 7, 5) for name, dtype in DTYPES.items()},
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    file = tmp_path_factory.mktemp("reader") / "model.safetensors"
    save_file(TENSORS, file)
    return Index.open(file)


@pytest.mark.parametrize("name", TENSORS)
def test_read_gives_the_tensor_bit_for_bit(index: Index, name: str) -> None:
    with Reader(index) as reader:
        found = reader.read(name)

    assert (found.dtype, found.shape) == (TENSORS[name].dtype, TENSORS[name].shape)
    assert found.is_contiguous()
    assert bits(found) == bits(TENSORS[name])
    assert found.untyped_storage().nbytes() == TENSORS[name].nbytes


@settings(deadline=None)
@given(name=st.sampled_from(sorted(DTYPES)), ends=st.tuples(st.integers(0, 35), st.integers(0, 35)))
def test_a_range_is_a_slice(index: Index, name: str, ends: tuple[int, int]) -> None:
    start, stop = sorted(ends)
    expected = TENSORS[name].reshape(-1)[start:stop]

    with Reader(index) as reader:
        found = reader.read_range(index[name], start, stop)

        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert bits(found) == bits(expected)
        assert reader.total_bytes_read == expected.nbytes


def test_read_into_fills_what_it_is_given(index: Index) -> None:
    out = torch.zeros(3, 4, dtype=torch.float32)

    with Reader(index) as reader:
        reader.read_into("F32", out[1:], start=2)

    assert bits(out[0]) == bytes(16)
    assert bits(out[1:]) == bits(TENSORS["F32"].reshape(-1)[2:10])


def test_bytes_are_counted_by_tensor(index: Index) -> None:
    with Reader(index) as reader:
        reader.read("F32")
        reader.read_range("F32", 0, 2)
        reader.read_range("BF16", 1, 4)
        reader.read("empty")

        assert reader.bytes_read == {"F32": 35 * 4 + 2 * 4, "BF16": 6}
        assert reader.total_bytes_read == 35 * 4 + 2 * 4 + 6


def test_the_default_device_is_not_used(index: Index) -> None:
    with Reader(index) as reader, torch.device("meta"):
        assert bits(reader.read("F32")) == bits(TENSORS["F32"])


def test_threads_share_a_reader(index: Index) -> None:
    work = [(name, start) for name in DTYPES for start in range(35)] * 4
    start_together = threading.Barrier(8)

    with Reader(index) as reader, ThreadPoolExecutor(8, initializer=start_together.wait) as pool:
        found = pool.map(lambda item: bits(reader.read_range(item[0], item[1], 35)), work)

        assert list(found) == [bits(TENSORS[name].reshape(-1)[start:]) for name, start in work]
        assert reader.total_bytes_read == sum((35 - start) * DTYPES[name].itemsize for name, start in work)


def test_nothing_stays_open_or_mapped(index: Index) -> None:
    (file,) = index.files
    process = psutil.Process()

    with Reader(index) as reader:
        tensor = reader.read("F32")
        assert [Path(opened.path) for opened in process.open_files()].count(file) == 1
        assert str(file) not in Path("/proc/self/maps").read_text()

    assert file not in [Path(opened.path) for opened in process.open_files()]
    assert bits(tensor) == bits(TENSORS["F32"])


def test_a_large_tensor_takes_its_own_size_and_no_more(tmp_path: Path) -> None:
    """Resident memory, measured while 320 MiB are read in 8 ranges that are dropped one after the other.

    A range is larger than anything glibc would keep when it is freed (32 MiB at most), whatever ran before.
    """
    part, count = 40 << 20, 8
    save_file({"large": torch.ones(count * part, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    process = psutil.Process()

    with Reader(Index.open(tmp_path)) as reader:
        reader.read_range("large", 0, part).sum()  # what the first call sets up is not measured
        before = process.memory_info().rss
        for number in range(count):
            assert reader.read_range("large", number * part, (number + 1) * part).sum() == part
        growth = process.memory_info().rss - before

    assert growth < 2 * part, "a mapped file would have grown by all of it"


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 36)])
def test_a_range_outside_the_tensor_is_refused(index: Index, start: int, stop: int) -> None:
    with Reader(index) as reader, pytest.raises(ValueError, match=r"stop <= 35 for 'F32'"):
        reader.read_range("F32", start, stop)


@pytest.mark.parametrize(
    ("out", "start", "problem"),
    [
        (torch.zeros(2, dtype=torch.float64), 0, "found torch.float64 on cpu"),
        (torch.zeros(2, device="meta"), 0, "on meta"),
        (torch.zeros(4)[::2], 0, "not contiguous"),
        (torch.zeros(2), 34, "found 34 to 36"),
        (torch.zeros(2), -1, "found -1 to 1"),
    ],
    ids=["dtype", "device", "strides", "past the end", "before the beginning"],
)
def test_a_destination_that_does_not_fit_is_refused(index: Index, out: torch.Tensor, start: int, problem: str) -> None:
    with Reader(index) as reader, pytest.raises(ValueError, match=problem):
        reader.read_into("F32", out, start=start)


def test_an_unknown_name_is_refused(index: Index) -> None:
    with Reader(index) as reader, pytest.raises(WeightsMismatchError, match="holds no tensor 'F33'"):
        reader.read("F33")


def test_a_closed_reader_is_refused(index: Index) -> None:
    reader = Reader(index)
    reader.close()
    reader.close()

    with pytest.raises(ValueError, match="this reader is closed"):
        reader.read("F32")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(64), "b": torch.ones(64)}, file)
    index = Index.open(file)

    with Reader(index) as reader:
        reader.read("a")
        os.truncate(file, index["b"].start + 100)

        with pytest.raises(
            CheckpointError, match=f"ends at byte {index['b'].start + 100}, inside tensor 'b'"
        ) as caught:
            reader.read("b")

        assert (caught.value.path, caught.value.tensor) == (file, "b")
        assert reader.bytes_read == {"a": 256, "b": 100}


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1)}, file)
    index = Index.open(file)
    file.unlink()

    with (
        Reader(index) as reader,
        pytest.raises(CheckpointError, match="Cannot read tensor 'a' from") as caught,
    ):
        reader.read("a")

    assert isinstance(caught.value.__cause__, FileNotFoundError)


def _yesterdays(folder: Path) -> Path:
    """A file of two tensors, written so long ago that whatever writes to it now does so at another time."""
    file = folder / "model.safetensors"
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, file)
    os.utime(file, (time.time() - 86400,) * 2)
    return file


def _grow(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"more")


def _write_another_value(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\0\0\0\0")


def _rename_a_tensor_at_the_same_time(file: Path) -> None:
    status, content = file.stat(), file.read_bytes()
    with file.open("r+b") as stream:
        stream.write(content.replace(b'"b"', b'"c"', 1))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def _replace_by_a_copy(file: Path) -> None:
    shutil.copy2(file, file.with_suffix(".copy"))
    file.with_suffix(".copy").replace(file)


def _become_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


CHANGES = {
    _grow: "it had 128 bytes, and has 132",
    _write_another_value: "it was written to at",
    _rename_a_tensor_at_the_same_time: "its header is another one",
    _replace_by_a_copy: "another file has taken its place",
    _become_a_folder: "it had 128 bytes",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, change: Callable[[Path], None]) -> None:
    file = _yesterdays(tmp_path)
    with Reader(Index.open(file)) as reader:
        reader.read("a")
        reader.check_unchanged()
        change(file)
        reader.read("b")
        says = f"{file} has changed since it was opened: {CHANGES[change]}"
        with pytest.raises(CheckpointError, match=says) as caught:
            reader.check_unchanged()
    assert caught.value.path == file


@pytest.mark.parametrize("change", [_grow, _write_another_value, _replace_by_a_copy, _become_a_folder])
def test_a_file_that_changes_before_it_is_read(tmp_path: Path, change: Callable[[Path], None]) -> None:
    file = _yesterdays(tmp_path)
    index = Index.open(file)
    change(file)
    with Reader(index) as reader, pytest.raises(CheckpointError, match="has changed since it was opened"):
        reader.read("a")


def test_a_file_that_nobody_read_may_change(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.ones(1)}, tmp_path / f"model-{name}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {name: f"model-{name}.safetensors" for name in ("a", "b")}})
    )
    with Reader(Index.open(tmp_path)) as reader:
        reader.read("a")
        _grow(tmp_path / "model-b.safetensors")
        reader.check_unchanged()
