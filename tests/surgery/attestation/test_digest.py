"""Laws of the digest: parts add up to the whole, and a change of any word shows."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.quantizers import digest
from surgery.quantizers.digest import PAGE, Piece, page_count, page_sums

#: Around the borders of words, pages, and of the runs that are computed at a time.
RUN = digest.RUN_BYTES["cpu"]
SIZES = (0, 1, 2, 3, 4, 5, PAGE - 1, PAGE, PAGE + 2, 2 * PAGE + 7, RUN - 1, RUN, RUN + 3, RUN + 2 * PAGE)
MODULUS = 2**64


def random_bytes(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def sums_of(data: torch.Tensor) -> torch.Tensor:
    return page_sums([Piece(data=data)])[0]


def by_definition(data: torch.Tensor) -> list[int]:
    """In Python's integers, which have no limit."""
    factors = [int(factor) for factor in digest._factors(data.device)]
    raw = data.numpy().tobytes()
    raw += bytes(-len(raw) % PAGE)
    pages = [raw[start : start + PAGE] for start in range(0, len(raw), PAGE)]
    return [
        sum(int.from_bytes(page[4 * i : 4 * i + 4], "little", signed=True) * factors[i] for i in range(PAGE // 4))
        % MODULUS
        for page in pages
    ]


@pytest.mark.parametrize("size", [0, 1, 7, PAGE, PAGE + 5])
def test_it_is_what_it_is_said_to_be(size: int) -> None:
    data = random_bytes(size)
    assert [int(found) % MODULUS for found in sums_of(data)] == by_definition(data)


def test_factors_are_odd_and_all_different() -> None:
    factors = digest._factors(torch.device("cpu"))
    assert len(set(factors.tolist())) == PAGE // 4
    assert bool((factors % 2 != 0).all())
    assert int(factors[0]) % MODULUS == 0xE220A8397B1DCDAF  # the first number of SplitMix64 from 0, which is odd


@given(size=st.sampled_from(SIZES), cuts=st.lists(st.floats(0, 1), max_size=5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_parts_add_up_to_the_whole_wherever_it_is_cut(size: int, cuts: list[float], seed: int) -> None:
    data = random_bytes(size, seed)
    ends = [0, *sorted(int(cut * size) for cut in cuts), size]
    pieces = [Piece(data=data[start:stop], start=start) for start, stop in pairwise(ends)]
    total = torch.zeros(page_count(size), dtype=torch.int64)
    for piece, sums in zip(pieces, page_sums(pieces), strict=True):
        assert len(sums) == len(piece.pages)
        total[piece.pages.start : piece.pages.stop] += sums
    assert torch.equal(total, sums_of(data))


@given(size=st.sampled_from(SIZES[1:]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=60)
def test_a_single_bit_shows_in_its_page_alone(size: int, place: float, bit: int) -> None:
    data = random_bytes(size)
    before, byte = sums_of(data), int(place * size)
    data[byte] ^= 1 << bit
    assert torch.nonzero(sums_of(data) != before).flatten().tolist() == [byte // PAGE]


@given(first=st.integers(0, 511), second=st.integers(0, 511), bit=st.integers(0, 31))
@settings(deadline=None, max_examples=60)
def test_exchanged_words_show_even_where_one_bit_tells_them_apart(first: int, second: int, bit: int) -> None:
    words = random_bytes(4 * 512).view(torch.int32)
    words[second] = words[first] ^ torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    before = sums_of(words)
    words[[first, second]] = words[[second, first]]
    assert torch.equal(sums_of(words), before) == (first == second)


def test_exchanged_pages_show() -> None:
    data = random_bytes(2 * PAGE)
    exchanged = torch.cat([data[PAGE:], data[:PAGE]])
    assert torch.equal(sums_of(exchanged), sums_of(data).flip(0))
    assert not torch.equal(sums_of(exchanged), sums_of(data))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int16, torch.int64])
def test_bytes_count_and_not_the_dtype(dtype: torch.dtype) -> None:
    data = random_bytes(2 * PAGE + 64)
    assert torch.equal(sums_of(data.view(dtype)), sums_of(data))
    assert torch.equal(sums_of(data.view(dtype).view(-1, 1)), sums_of(data))


def test_not_a_number_is_as_good_as_a_number() -> None:
    quiet, other = (torch.tensor([bits], dtype=torch.int16).view(torch.bfloat16) for bits in (0x7FC0, 0x7FC1))
    assert bool(quiet.isnan() & other.isnan())
    assert not torch.equal(sums_of(quiet), sums_of(other))


def test_pieces_are_apart_and_many_are_as_one() -> None:
    pieces = [Piece(data=random_bytes(size, seed), start=seed) for seed, size in enumerate(SIZES)]
    together = page_sums(pieces)
    assert [len(sums) for sums in together] == [len(piece.pages) for piece in pieces]
    for piece, sums in zip(pieces, together, strict=True):
        assert torch.equal(sums, page_sums([piece])[0])


def test_a_scalar_and_nothing() -> None:
    assert len(sums_of(torch.tensor(1.5))) == 1
    assert page_sums([]) == []
    assert sums_of(torch.empty(0)).shape == (0,)
