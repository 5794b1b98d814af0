"""Weights of a mixture of experts in 4 bits: packed bytes and statistics, expert after expert, and their values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from surgery.errors import QuantizerError

__all__ = [
    "NESTED_BLOCKSIZE",
    "PackedStack",
    "Section",
    "as_bytes",
    "check_not_cast",
    "code_of",
    "dequantized",
    "dynamic_code",
    "nested_values",
    "stacks_of",
]

#: Statistics that share one statistic of their own, with double quantization; as in upstream's `quantize_4bit`.
NESTED_BLOCKSIZE = 256

#: Bytes that a section of the statistics begins at a multiple of, and that all of them are a multiple of: no dtype that
#: they may be stored in, nor a copy of 16 bytes at a time, straddles two of them.
ALIGNMENT = 16

#: Tables of values by 4-bit type, or "" of statistics, and device: torch.compile looks through `functools.cache`.
_codes: dict[tuple[str, torch.device], torch.Tensor] = {}


class Section(NamedTuple):
    """The place of one kind of statistic of all experts among the bytes of a stack's statistics."""

    start: int
    dtype: torch.dtype
    elements: int

    @property
    def bytes(self) -> slice:
        """The range of bytes."""
        return slice(self.start, self.start + self.elements * self.dtype.itemsize)


@dataclass(frozen=True, kw_only=True)
class PackedStack:
    """The layout of the 4-bit weights of all experts of a layer, one parameter of its class.

    Packed bytes are those of `quantize_4bit` of expert 0, then of expert 1, and so on. The statistics are bytes too:
    one section after the other, each of all experts. With double quantization the statistics of an expert are
    quantized by themselves, as `quantize_4bit(expert, compress_statistics=True)` does: they have their own mean and
    blocks, the last of which may be partial.

    shape: of one expert, as its class stores it; whole blocks.
    dtype: of dequantized values.
    """

    experts: int
    shape: tuple[int, int]
    quant_type: str
    blocksize: int
    double_quant: bool
    dtype: torch.dtype

    def __post_init__(self) -> None:
        assert self.numel % self.blocksize == 0, "blocks straddle experts"

    @property
    def size(self) -> torch.Size:
        """`(experts, *shape)`."""
        return torch.Size((self.experts, *self.shape))

    @property
    def numel(self) -> int:
        """Elements of one expert."""
        return self.shape[0] * self.shape[1]

    @property
    def blocks(self) -> int:
        """Blocks of one expert: its float32 statistics."""
        return self.numel // self.blocksize

    @property
    def nested_blocks(self) -> int:
        """Blocks of the statistics of one expert, with double quantization."""
        return -(-self.blocks // NESTED_BLOCKSIZE)

    @property
    def packed_bytes(self) -> int:
        """Packed bytes of all experts."""
        return self.experts * self.numel // 2

    @functools.cached_property
    def sections(self) -> Mapping[str, Section]:
        """The statistics by name: `absmax`, and with double quantization `nested_absmax` and `offset`, in order."""
        kinds = {"absmax": (torch.float32, self.blocks)}
        if self.double_quant:
            kinds = {
                "absmax": (torch.uint8, self.blocks),
                "nested_absmax": (torch.float32, self.nested_blocks),
                "offset": (torch.float32, 1),
            }
        found: dict[str, Section] = {}
        start = 0
        for name, (dtype, each) in kinds.items():
            found[name] = section = Section(start, dtype, self.experts * each)
            start = _padded(section.bytes.stop)
        return found

    @property
    def statistics_bytes(self) -> int:
        """Bytes of the statistics of all experts, padded to a multiple of `ALIGNMENT`."""
        return max(_padded(section.bytes.stop) for section in self.sections.values())

    def ranges(self, experts: range) -> dict[str, range]:
        """The bytes of consecutive experts in each section, of the statistics of all."""
        found = {}
        for name, section in self.sections.items():
            each = section.elements // self.experts * section.dtype.itemsize
            found[name] = range(section.start + experts.start * each, section.start + experts.stop * each)
        return found

    def assemble(self, statistics: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The statistics as bytes, `(statistics_bytes,)` uint8, on their device; padding is zeros.

        statistics: each of `sections` by its name, of the dtype and the number of elements that it has there.
        """
        out = torch.zeros(self.statistics_bytes, dtype=torch.uint8, device=statistics["absmax"].device)
        for name, section in self.sections.items():
            given = statistics[name]
            assert (given.dtype, given.numel()) == (section.dtype, section.elements), name
            out[section.bytes] = as_bytes(given)
        return out

    def views(self, statistics: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each of `sections`, 1-D and in its dtype: views of `statistics`, of any dtype, or copies if not aligned."""
        whole = as_bytes(statistics)
        return self.typed({name: whole[section.bytes] for name, section in self.sections.items()})

    def typed(self, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each of `sections` in its dtype, of its bytes, 1-D: a view, or a copy if they are not aligned."""
        return {name: _aligned(found[name], section.dtype) for name, section in self.sections.items()}

    def dequantize(self, packed: torch.Tensor, statistics: torch.Tensor, experts: range) -> torch.Tensor:
        """The values of consecutive experts, `(len(experts), *shape)` in `dtype`.

        packed, statistics: of all experts, in any dtype and shape.
        """
        import bitsandbytes  # noqa: F401 - it has the operator

        each = self.numel // 2
        # Flat: the kernel for a CPU misreads rows that are not whole blocks.
        values: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            as_bytes(packed)[experts.start * each : experts.stop * each],
            self._absmax(self.views(statistics), experts),
            self.blocksize,
            self.quant_type,
            [len(experts) * self.numel],
            self.dtype,
        )
        return values.view(len(experts), *self.shape)

    def elements(self, packed: torch.Tensor, start: int, statistics: torch.Tensor) -> torch.Tensor:
        """The values, 1-D in `dtype`, of the bytes `packed`, uint8 and 1-D, from flat element `start` on.

        statistics: of all experts, in any dtype and shape.
        """

        def absmax(blocks: range) -> torch.Tensor:
            experts = range(blocks.start // self.blocks, -(-blocks.stop // self.blocks))
            first = blocks.start - experts.start * self.blocks
            return self._absmax(self.views(statistics), experts)[first : first + len(blocks)]

        return dequantized(
            packed, start, absmax, blocksize=self.blocksize, quant_type=self.quant_type, dtype=self.dtype
        )

    def _absmax(self, statistics: Mapping[str, torch.Tensor], experts: range) -> torch.Tensor:
        """The float32 statistics of consecutive experts, `(len(experts) * blocks,)`."""
        run = {name: of_all.view(self.experts, -1)[experts.start : experts.stop] for name, of_all in statistics.items()}
        if not self.double_quant:
            return run["absmax"].reshape(-1)
        if self.blocks % NESTED_BLOCKSIZE == 0:  # then no nested block straddles experts: one launch for all
            values: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(
                run["absmax"].reshape(-1),
                run["nested_absmax"].reshape(-1),
                dynamic_code(run["absmax"].device),
                NESTED_BLOCKSIZE,
                torch.float32,
            )
            return values.view(len(experts), -1).add_(run["offset"]).view(-1)
        return nested_values(run["absmax"], run["nested_absmax"], run["offset"], blocks=range(self.blocks)).view(-1)


def stacks_of(module: nn.Module) -> Mapping[str, PackedStack]:
    """The stacks of weights in 4 bits that `module` holds, by the names of its parameters; empty for most modules."""
    found: Mapping[str, PackedStack] = vars(module).get("packed_stacks", {})
    return found


def check_not_cast(module: Any, *held: torch.Tensor) -> None:
    """Raise `QuantizerError` if bytes are in another dtype than the `quant_storage` of `module`: they mean nothing."""
    for each in held:
        if each.dtype != module.quant_storage:
            raise QuantizerError(
                f"expected packed bytes and their statistics in {module.quant_storage}, found them cast to "
                f"{each.dtype}: load the model with dtype= instead of casting it, or a part of it; or with "
                "quant_storage=torch.uint8, which is never cast"
            )


def dequantized(
    packed: torch.Tensor,
    start: int,
    absmax: Callable[[range], torch.Tensor],
    *,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The values, 1-D in `dtype`, of the bytes `packed`, uint8 and 1-D, from flat element `start` of a weight.

    By the kernel under `dequantize_4bit`, which takes whole blocks. absmax: gives float32 statistics of some blocks.
    """
    blocks = range(start // blocksize, -(-(start + 2 * packed.numel()) // blocksize))
    before = (start - blocks.start * blocksize) // 2
    whole = packed
    if packed.numel() != len(blocks) * blocksize // 2:
        whole = packed.new_zeros(len(blocks) * blocksize // 2)
        whole[before : before + packed.numel()] = packed
    values: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        whole, absmax(blocks), blocksize, quant_type, [2 * whole.numel()], dtype
    )
    return values.view(-1)[2 * before : 2 * (before + packed.numel())]


def nested_values(
    quantized: torch.Tensor,
    absmax: torch.Tensor,
    offset: torch.Tensor,
    *,
    blocks: range,
    code: torch.Tensor | None = None,
    blocksize: int = NESTED_BLOCKSIZE,
) -> torch.Tensor:
    """Float32 statistics from double-quantized ones, as bitsandbytes computes them.

    quantized: uint8 `(..., len(blocks))`. absmax: float32 `(..., all)`, which `blocks` counts in. offset: float32,
    which broadcasts. code: the 256 values of the bytes, if not those that bitsandbytes has.
    """
    code = dynamic_code(quantized.device) if code is None else code
    number = torch.arange(blocks.start, blocks.stop, device=quantized.device) // blocksize
    return code[quantized.int()] * absmax[..., number] + offset


def code_of(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values of a 4-bit type. One tensor for all weights: making one copies to the device, and waits for it."""
    from bitsandbytes.functional import get_4bit_type

    if (quant_type, device) not in _codes:
        _codes[quant_type, device] = get_4bit_type(quant_type, device=device)
    return _codes[quant_type, device]


def dynamic_code(device: torch.device) -> torch.Tensor:
    """The 256 values that statistics are quantized to; one tensor for all, as `code_of`."""
    from bitsandbytes.functional import create_dynamic_map

    if ("", device) not in _codes:
        _codes["", device] = create_dynamic_map().to(device)
    return _codes["", device]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor of any dtype and shape: a view, uint8 and 1-D."""
    return tensor.reshape(-1).view(torch.uint8)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _aligned(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`data`, 1-D bytes, in `dtype`: copied if it does not begin where that may, in a shard or a flat parameter."""
    if torch.compiler.is_compiling():  # addresses would break the graph
        return data.clone().view(dtype)
    is_aligned = data.storage_offset() % dtype.itemsize == 0 and data.data_ptr() % dtype.itemsize == 0
    return (data if is_aligned else data.clone()).view(dtype)
