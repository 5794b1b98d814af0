"""Reading ahead: everything in order, from bounded memory, by any number of threads, and an end to all of it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from surgery.checkpoint import Index, Prefetch, Reader, Request, Segment, TensorEntry
from surgery.checkpoint.header import DTYPES
from surgery.errors import CheckpointError

NUMEL = 1000
SOON = 250


def random_tensor(dtype: torch.dtype) -> torch.Tensor:
    """Random bits, NaN patterns among them; zeros and ones for bool, which has no others."""
    if dtype == torch.bool:
        return torch.rand(NUMEL) < 0.5
    return torch.randint(0, 256, (NUMEL * dtype.itemsize,), dtype=torch.uint8).view(dtype)


TENSORS = {name: random_tensor(dtype) for name, dtype in DTYPES.items()}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """A tensor of each dtype, in two files."""
    folder = tmp_path_factory.mktemp("prefetch")
    names = list(TENSORS)
    save_file({name: TENSORS[name] for name in names[::2]}, folder / "one.safetensors")
    save_file({name: TENSORS[name] for name in names[1::2]}, folder / "two.safetensors")
    weight_map = {name: f"{'one' if number % 2 == 0 else 'two'}.safetensors" for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return Index.open(folder)


def request(index: Index, name: str, start: int = 0, stop: int = NUMEL) -> Request:
    return Request(segments=(Segment(entry=index[name]),), start=start, stop=stop)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether `holds` comes true within `SOON` seconds."""
    end = time.monotonic() + SOON
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.001)
    return holds()


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("surgery-read")]


class SlowReader(Reader):
    """A reader that says when it begins to read, and reads when it may."""

    def __init__(self, index: Index) -> None:
        super().__init__(index)
        self.begun: list[str] = []
        self.may_read = threading.Event()

    def read_bytes(self, entry: TensorEntry, out: memoryview, *, start: int = 0) -> None:
        self.begun.append(f"{entry.name} {start}")
        assert self.may_read.wait(SOON)
        super().read_bytes(entry, out, start=start)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[str, int, int]:
    start, stop = sorted(draw(st.lists(st.integers(0, NUMEL), min_size=2, max_size=2, unique=True)))
    return draw(st.sampled_from(sorted(TENSORS))), start, stop


@settings(deadline=None)
@given(
    wanted=st.lists(ranges(), max_size=12),
    chunk_elements=st.integers(40, 1200),
    buffers=st.integers(1, 9),
    threads=st.integers(1, 8),
)
def test_chunks_come_in_order_and_make_up_the_ranges(
    index: Index, wanted: list[tuple[str, int, int]], chunk_elements: int, buffers: int, threads: int
) -> None:
    requests = [request(index, *each) for each in wanted]
    with (
        Reader(index) as reader,
        Prefetch(reader, requests, chunk_elements=chunk_elements, buffers=buffers, threads=threads) as prefetch,
    ):
        for name, start, stop in wanted:
            for position in range(start, stop, chunk_elements):
                chunk = prefetch.next()
                expected = TENSORS[name][position : min(position + chunk_elements, stop)]
                assert (chunk.start, chunk.data.dtype, chunk.data.dim()) == (position, expected.dtype, 1)
                assert bits(chunk.data) == bits(expected)
                chunk.release()
        with pytest.raises(IndexError):
            prefetch.next()
        assert reader.total_bytes_read == sum(r.nbytes for r in requests)


def test_no_more_is_read_than_there_are_buffers(index: Index) -> None:
    with (
        Reader(index) as reader,
        Prefetch(reader, [request(index, "BF16")], chunk_elements=100, buffers=3, threads=8) as prefetch,
    ):
        assert eventually(lambda: reader.total_bytes_read == 3 * 200)
        chunks = [prefetch.next() for _ in range(3)]
        time.sleep(0.05)  # for what must not happen
        assert reader.total_bytes_read == 3 * 200
        with pytest.raises(IndexError):
            prefetch.next()
        chunks[1].release()
        assert bits(prefetch.next().data) == bits(TENSORS["BF16"][300:400])
        assert reader.total_bytes_read == 4 * 200


def test_chunks_that_are_held_keep_what_they_hold(index: Index) -> None:
    with (
        Reader(index) as reader,
        Prefetch(reader, [request(index, "F16")], chunk_elements=100, buffers=2, threads=1) as prefetch,
    ):
        held = prefetch.next()
        for start in range(100, NUMEL, 100):
            chunk = prefetch.next()
            assert chunk.start == start
            chunk.release()
        assert bits(held.data) == bits(TENSORS["F16"][:100])


def test_buffers_are_used_again_and_grow_for_a_wider_dtype(index: Index) -> None:
    names = ("U8", "BF16", "F16", "F32", "BF16", "F32", "U8")
    requests = [request(index, name, 0, 100) for name in names]
    seen = []
    with Reader(index) as reader, Prefetch(reader, requests, chunk_elements=100, buffers=1, threads=1) as prefetch:
        for name in names:
            chunk = prefetch.next()
            assert bits(chunk.data) == bits(TENSORS[name][:100])
            seen.append((chunk.data.data_ptr(), chunk.data.untyped_storage().nbytes()))
            chunk.release()
    assert [size for _, size in seen] == [100, 200, 200, 400, 400, 400, 400]
    assert len({address for address, size in seen if size == 400}) == 1


def test_many_threads_read_at_the_same_time(index: Index) -> None:
    with (
        SlowReader(index) as reader,
        Prefetch(reader, [request(index, "I64")], chunk_elements=100, buffers=8, threads=4) as prefetch,
    ):
        assert eventually(lambda: len(reader.begun) == 4)
        assert len(reading_threads()) == 4
        reader.may_read.set()
        for start in range(0, NUMEL, 100):
            chunk = prefetch.next()
            assert bits(chunk.data) == bits(TENSORS["I64"][start : start + 100])
            chunk.release()
    assert reading_threads() == []


def test_the_error_of_a_reading_thread_comes_with_its_chunk(index: Index, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"cut": torch.ones(NUMEL)}, file)
    cut = Index.open(file)
    with Reader(cut) as reader:
        reader.read_range("cut", 0, 1)
        os.truncate(file, cut["cut"].start + 250 * 4)
        with Prefetch(reader, [request(cut, "cut")], chunk_elements=100, buffers=4, threads=2) as prefetch:
            for _ in range(2):
                assert torch.equal(prefetch.next().data, torch.ones(100))
            with pytest.raises(CheckpointError, match=r"ends at byte .*, inside tensor 'cut'") as caught:
                prefetch.next()
            assert caught.value.tensor == "cut"
    assert reading_threads() == []


def test_closing_waits_for_what_is_being_read_and_reads_no_more(index: Index) -> None:
    with SlowReader(index) as reader:
        prefetch = Prefetch(reader, [request(index, "F64")], chunk_elements=100, buffers=6, threads=2)
        assert eventually(lambda: len(reader.begun) == 2)
        closing = threading.Thread(target=prefetch.close)
        closing.start()
        closing.join(0.05)
        assert closing.is_alive()
        reader.may_read.set()
        closing.join(SOON)
        assert not closing.is_alive()
        assert sorted(reader.begun) == ["F64 0", "F64 100"]
        assert reader.total_bytes_read == 2 * 100 * 8
    assert reading_threads() == []


def interrupted_while_reading(index: Index) -> None:
    with (
        Reader(index) as reader,
        Prefetch(reader, [request(index, "F64")], chunk_elements=7, buffers=4, threads=4) as prefetch,
    ):
        prefetch.next().release()
        raise KeyboardInterrupt


def test_leaving_the_block_by_an_error_ends_the_threads(index: Index) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_while_reading(index)
    assert reading_threads() == []


def test_requests_are_taken_only_when_there_is_a_buffer_for_them(index: Index) -> None:
    taken: list[str] = []

    def requests() -> Iterator[Request]:
        for name in ("I8", "I16", "I32", "I64"):
            taken.append(name)
            yield request(index, name)

    with Reader(index) as reader, Prefetch(reader, requests(), chunk_elements=NUMEL, buffers=2, threads=1) as prefetch:
        assert taken == ["I8", "I16"]
        prefetch.next().release()
        assert taken == ["I8", "I16", "I32"]


def test_files_are_opened_once_and_closed(index: Index) -> None:
    process, before = psutil.Process(), psutil.Process().num_fds()
    requests = [request(index, name) for name in TENSORS]
    with Reader(index) as reader, Prefetch(reader, requests, chunk_elements=10, buffers=16, threads=8) as prefetch:
        for _ in range(len(TENSORS) * NUMEL // 10):
            prefetch.next().release()
        opened = [Path(each.path) for each in process.open_files()]
        assert [opened.count(file) for file in index.files] == [1, 1]
    assert process.num_fds() == before


def test_the_default_device_is_not_used(index: Index) -> None:
    with (
        torch.device("meta"),
        Reader(index) as reader,
        Prefetch(reader, [request(index, "F32")], chunk_elements=NUMEL, buffers=1, threads=1) as prefetch,
    ):
        assert bits(prefetch.next().data) == bits(TENSORS["F32"])
