"""Weights that a checkpoint holds packed, in a format of bitsandbytes: found by their names, and checked.

Of a weight `W` in 4 bits there are its packed bytes `W`, statistics `W.absmax`, the 16 values `W.quant_map`, and
settings as JSON in `W.quant_state.bitsandbytes__nf4` (or `fp4`). With double quantization `W.absmax` is quantized too,
by `W.nested_absmax` and `W.nested_quant_map`. A stack of experts, of three dimensions, has in each of these what each
expert would have by itself, one behind the other, and with double quantization their means in `W.nested_offset`. Of a
weight in 8 bits, `X.weight`, there are the int8 values themselves, the largest absolute value of each row in `X.SCB`,
and maybe how rows lie in `X.weight_format`. docs/formats.md has every key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from surgery.checkpoint.header import TensorEntry, parse_json
from surgery.checkpoint.index import Index
from surgery.errors import CheckpointError

__all__ = ["INT8", "PackedSettings", "PackedWeight", "configuration", "find_packed"]

Read = Callable[[TensorEntry, int, int], torch.Tensor]

STATE = "quant_state.bitsandbytes__"

PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset")

#: Names of the tensors beside a packed weight, behind its own and a dot.
_SIDE = re.compile(rf"(?P<weight>.+)\.(?P<part>{'|'.join(PARTS)}|{re.escape(STATE)}\w+)", re.DOTALL)

#: Names of the tensors beside a weight in 8 bits, behind its module's and a dot.
_SIDE_8BIT = re.compile(r"(?P<module>.+)\.(?P<part>SCB|weight_format)", re.DOTALL)

#: What bitsandbytes calls its 8-bit format (LLM.int8), and the threshold of outliers that transformers' config means.
INT8, THRESHOLD = "int8", 6.0

#: One in 127, as float32 has it: what bitsandbytes multiplies by.
_STEP = 7.874015748031496e-3

#: Elements of `quant_map` and of `nested_quant_map`.
VALUES, NESTED_VALUES = 16, 256

#: Settings that are read at a time: a file over a network answers after a millisecond.
THREADS = 8

#: Bytes of settings; no weight of bitsandbytes has more than some 300.
_MOST_SETTINGS = 1 << 16

#: What the kernels of bitsandbytes take.
_BLOCKSIZES = tuple(1 << power for power in range(5, 13))

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class PackedSettings:
    """The settings of a packed weight.

    quant_type: `nf4`, `fp4` or `int8`. dtype: in which it was quantized, and is dequantized; of int8 the model's.
    shape: the weight's own, `(out, in)`, or `(experts, d1, d2)` of a stack, whose experts are packed each by itself.
    blocksize: elements that share one absmax, a row of int8. nested_blocksize: of absmax values that share one.
    nested_offset: added to every absmax; None of a stack, which has one for each expert in a tensor. threshold: of
    activations of int8 layers, above which a column is an outlier; of config.json.
    """

    quant_type: str
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nested_blocksize: int | None = None
    nested_offset: float | None = None
    threshold: float = THRESHOLD

    @property
    def values_per_byte(self) -> int:
        """Elements that a byte holds."""
        return 1 if self.quant_type == INT8 else 2

    @property
    def double_quant(self) -> bool:
        """Whether statistics are quantized too."""
        return self.nested_blocksize is not None

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of experts."""
        return len(self.shape) == 3

    @property
    def experts(self) -> int:
        """Weights that are packed each by itself: of a stack its experts, else one."""
        return self.shape[0] if self.is_stack else 1

    @property
    def blocks(self) -> int:
        """Statistics of each of these."""
        return -(-math.prod(self.shape) // self.experts // self.blocksize)

    @property
    def kind(self) -> str:
        """The settings that all weights of a model share, for people."""
        if self.quant_type == INT8:
            return "8 bits of bitsandbytes"
        nested = f", absmax in blocks of {self.nested_blocksize}" if self.double_quant else ""
        return f"{self.quant_type} in blocks of {self.blocksize}{nested}"


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedWeight:
    """One packed weight of a checkpoint, complete and checked: entries of its tensors, and its settings.

    data: the packed bytes, in any dtype and shape. absmax: float32, or uint8 with double quantization; quant_map: 16
    float32; None in 8 bits. nested_absmax, nested_quant_map: float32; None without double quantization. nested_offset:
    float32, one for each expert of a stack with double quantization; else None. state: the settings' JSON; in 8 bits
    `weight_format`, or None.
    """

    data: TensorEntry
    absmax: TensorEntry
    quant_map: TensorEntry | None = None
    state: TensorEntry | None = None
    nested_absmax: TensorEntry | None = None
    nested_quant_map: TensorEntry | None = None
    nested_offset: TensorEntry | None = None
    settings: PackedSettings

    @property
    def name(self) -> str:
        """The name of the weight."""
        return self.data.name

    @property
    def logical(self) -> TensorEntry:
        """The entry that it would have unpacked; only name, file, dtype and shape mean something."""
        return replace(self.data, dtype=self.settings.dtype, shape=self.settings.shape)

    def side(self) -> tuple[TensorEntry, ...]:
        """The entries beside the packed bytes."""
        nested = (self.nested_absmax, self.nested_quant_map, self.nested_offset)
        found = (self.absmax, self.quant_map, *nested, self.state)
        return tuple(entry for entry in found if entry is not None)

    @property
    def shared_bytes(self) -> int:
        """Bytes beside it that every rank reads; absmax is divided."""
        return sum(each.nbytes for each in self.side() if each is not self.absmax and each is not self.state)

    def stored_as(self, dtype: torch.dtype) -> TensorEntry:
        """The entry of the packed bytes, seen as `(n, 1)` of `dtype`, whose size divides theirs."""
        return replace(self.data, dtype=dtype, shape=(self.data.nbytes // dtype.itemsize, 1))

    def dequantize(self, read: Read, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The elements `start` to `stop` of the flattened weight: 1-D, in its own dtype, on the CPU.

        By a look-up in its own table, since the kernel of bitsandbytes for a CPU misreads rows of partial blocks; in 8
        bits as its `int8_vectorwise_dequant`. Reads what these elements need.
        """
        stop = math.prod(self.settings.shape) if stop is None else stop
        size = self.settings.blocksize
        absmax = self._absmax(read, start // size, -(-stop // size))
        blocks = torch.arange(start, stop) // size - start // size
        if self.quant_map is None:
            values = read(self.stored_as(torch.int8), start, stop) * absmax[blocks] * _STEP
            return values.to(self.settings.dtype)
        first, last = start // 2, -(-stop // 2)
        packed = read(self.stored_as(torch.uint8), first, last)
        nibbles = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[start - 2 * first : stop - 2 * first]
        values = read(self.quant_map, 0, VALUES)[nibbles.int()]
        return (values * absmax[blocks]).to(self.settings.dtype)

    def _absmax(self, read: Read, first: int, last: int) -> torch.Tensor:
        """The statistics of the blocks `first` to `last`, float32."""
        absmax = read(self.absmax, first, last)
        if self.nested_absmax is None or self.nested_quant_map is None or first == last:
            return absmax
        size, each = self.settings.nested_blocksize, self.settings.blocks
        assert size is not None
        experts = torch.arange(first, last) // each
        # Blocks of statistics begin anew with every expert.
        nested = experts * -(-each // size) + torch.arange(first, last) % each // size
        begin, end = int(nested[0]), int(nested[-1]) + 1
        values = read(self.nested_quant_map, 0, NESTED_VALUES)[absmax.int()]
        if self.nested_offset is None:
            offset = torch.tensor(self.settings.nested_offset)
        else:
            offset = read(self.nested_offset, 0, self.settings.experts)[experts]
        return values * read(self.nested_absmax, begin, end)[nested - begin] + offset


def find_packed(index: Index, config: Mapping[str, Any] | None, *, path: Path, read: Read) -> dict[str, PackedWeight]:
    """The packed weights of `index` by name; settings are read by `read`, in threads.

    config: the content of config.json, which has the dtype of weights in 8 bits, and the threshold of their layers.
    Raises `CheckpointError` for a weight of which a tensor is missing, of another size than its settings say, or in
    settings that no version of bitsandbytes writes.
    """
    sides: dict[str, dict[str, TensorEntry]] = {}
    rows: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in index.items():
        if found := _SIDE.fullmatch(name):
            sides.setdefault(found["weight"], {})[found["part"]] = entry
        elif found := _SIDE_8BIT.fullmatch(name):
            rows.setdefault(f"{found['module']}.weight", {})[found["part"]] = entry
    of_model: dict[str, Any] = (
        {"dtype": _dtype(config or {}), "threshold": _threshold(config or {}, path=path)} if rows else {}
    )
    with ThreadPoolExecutor(THREADS, thread_name_prefix="surgery-packed") as pool:
        made = [
            *pool.map(lambda item: _made(index, *item, path=path, read=read), sides.items()),
            *pool.map(lambda item: _made_8bit(index, *item, path=path, read=read, **of_model), rows.items()),
        ]
    return {weight.name: weight for weight in made}


def _made_8bit(
    index: Index, name: str, parts: Mapping[str, TensorEntry], *, path: Path, read: Read, **of_model: Any
) -> PackedWeight:
    data, absmax, state = index.get(name), parts.get("SCB"), parts.get("weight_format")
    if data is None or absmax is None:
        missing = name if data is None else f"{name.removesuffix('weight')}SCB"
        raise _broken(path, name, f"there is {next(iter(parts.values())).name}, and no tensor {missing}")
    if data.dtype != torch.int8 or len(data.shape) != 2 or not data.numel:
        raise _broken(path, name, f"expected int8 of shape (out, in) beside {absmax.name}, found {_described(data)}")
    if absmax.dtype != torch.float32 or absmax.numel != data.shape[0]:
        raise _broken(
            path,
            name,
            f"expected {absmax.name} to be float32, one for each of {data.shape[0]} rows of {name}, found "
            f"{_described(absmax)}",
        )
    if state is not None and (state.dtype != torch.uint8 or state.numel != 1 or read(state, 0, 1).item() != 0):
        raise CheckpointError(
            f"{state.name} in {path} says that {name} is not stored row by row, but in an order for one kind of GPU "
            "(col32, col_turing or col_ampere), which bitsandbytes reads no more: use the checkpoint in 16 bits that "
            "it was made from.",
            path=path,
            tensor=state.name,
        )
    settings = PackedSettings(quant_type=INT8, blocksize=data.shape[1], shape=tuple(data.shape), **of_model)
    return PackedWeight(data=data, absmax=absmax, state=state, settings=settings)


def _described(entry: TensorEntry) -> str:
    return f"{str(entry.dtype).removeprefix('torch.')} of shape {tuple(entry.shape)}"


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the model; float16, from which LLM.int8 quantizes, if `config` has none."""
    for part in (config, config.get("text_config")):
        name = (part.get("dtype") or part.get("torch_dtype")) if isinstance(part, Mapping) else None
        if isinstance(name, str) and name in _DTYPES:
            return _DTYPES[name]
    return torch.float16


def _threshold(config: Mapping[str, Any], *, path: Path) -> float:
    """The threshold of outliers in 8-bit layers."""
    found = configuration(config)
    value = THRESHOLD if found is None else found.get("llm_int8_threshold", THRESHOLD)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise CheckpointError(
            f"{path}: expected llm_int8_threshold in quantization_config of config.json to be a number of 0 or more, "
            f"found {value!r:.40}",
            path=path,
        )
    return float(value)


def configuration(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization_config of a model config, or of the text part of a multimodal one."""
    for part in (config, config.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, Mapping) else None
        if found:
            return found if isinstance(found, Mapping) else {}
    return None


def _made(index: Index, name: str, parts: Mapping[str, TensorEntry], *, path: Path, read: Read) -> PackedWeight:
    states = {part: entry for part, entry in parts.items() if part.startswith(STATE)}
    missing = [each for each in ("absmax", "quant_map") if each not in parts]
    missing += [] if ("nested_absmax" in parts) == ("nested_quant_map" in parts) else ["nested_absmax or _quant_map"]
    if name not in index:
        raise _broken(path, name, f"there is {next(iter(parts.values())).name}, and no tensor {name}")
    if len(states) != 1:
        raise _broken(path, name, f"expected one {name}.{STATE}nf4 or fp4, found {', '.join(states) or 'none'}")
    if missing:
        raise _broken(path, name, f"{', '.join(f'{name}.{each}' for each in missing)} is missing")
    part, state = next(iter(states.items()))
    try:
        settings = _parsed(state, part.removeprefix(STATE), read)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise _broken(path, name, f"{state.name} does not have the settings that bitsandbytes writes: {error}") from (
            error
        )
    weight = PackedWeight(
        data=index[name],
        absmax=parts["absmax"],
        quant_map=parts["quant_map"],
        nested_absmax=parts.get("nested_absmax"),
        nested_quant_map=parts.get("nested_quant_map"),
        nested_offset=parts.get("nested_offset"),
        state=state,
        settings=settings,
    )
    if why := _contradiction(weight):
        raise _broken(path, name, why)
    for entry, dtypes, count in _expected(weight):
        if entry.dtype not in dtypes or entry.numel != count:
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise _broken(
                path,
                name,
                f"expected {entry.name} to have {count:,} elements of {kinds}, by its shape {settings.shape} and "
                f"blocks of {settings.blocksize}, as its settings say; found {entry.numel:,} of "
                f"{str(entry.dtype).removeprefix('torch.')}",
            )
    return weight


def _contradiction(weight: PackedWeight) -> str | None:
    """The reason why the tensors of `weight` cannot be those of its settings, if there is one."""
    settings, name = weight.settings, weight.name
    if settings.double_quant != (weight.nested_absmax is not None):
        return f"the settings of {name} and the tensors beside it differ in whether absmax is quantized too"
    if (settings.double_quant and settings.is_stack) == (weight.nested_offset is not None):
        return None
    found = "is missing" if weight.nested_offset is None else "is there, and it is no stack with double quantization"
    return f"{name}.nested_offset, of the means of experts, {found}"


def _expected(weight: PackedWeight) -> Iterator[tuple[TensorEntry, tuple[torch.dtype, ...], int]]:
    """Entries, with the dtypes that they may have, and their numbers of elements."""
    settings, data, float32 = weight.settings, weight.data, (torch.float32,)
    numel = math.prod(settings.shape)
    blocks = settings.experts * settings.blocks
    storages = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
    yield data, storages, -(-numel // 2) // data.dtype.itemsize
    yield replace(data, dtype=torch.uint8, shape=(data.nbytes,)), (torch.uint8,), -(-numel // 2)
    yield weight.absmax, (torch.uint8,) if settings.double_quant else float32, blocks
    assert weight.quant_map is not None
    yield weight.quant_map, float32, VALUES
    if weight.nested_absmax is not None and weight.nested_quant_map is not None:
        assert settings.nested_blocksize is not None
        yield weight.nested_absmax, float32, settings.experts * -(-settings.blocks // settings.nested_blocksize)
        yield weight.nested_quant_map, float32, NESTED_VALUES
    if weight.nested_offset is not None:
        yield weight.nested_offset, float32, settings.experts


def _parsed(entry: TensorEntry, quant_type: str, read: Read) -> PackedSettings:
    """The settings in `entry`. Raises ValueError, TypeError or KeyError for what is none."""
    if entry.dtype != torch.uint8 or not 0 < entry.nbytes <= _MOST_SETTINGS:
        raise ValueError(f"expected 1 to {_MOST_SETTINGS:,} elements of uint8, found {_described(entry)}")
    content: Any = parse_json(read(entry, 0, entry.numel).numpy().tobytes())
    if not isinstance(content, dict):
        raise TypeError(f"expected a JSON object, found {type(content).__name__}")
    absent = [key for key in ("quant_type", "blocksize", "dtype", "shape") if key not in content]
    if absent:
        raise ValueError(f"it has no {', '.join(absent)}")
    if content["quant_type"] != quant_type or quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type {content['quant_type']!r:.40} under the name of {quant_type!r:.40}")
    dtype, shape = content["dtype"], content["shape"]
    if str(dtype) not in _DTYPES:
        raise ValueError(f"expected dtype to be {' or '.join(_DTYPES)}, found {dtype!r:.40}")
    if not isinstance(shape, list) or not shape or any(type(size) is not int or size < 1 for size in shape):
        raise ValueError(f"expected shape to be numbers above 0, found {shape!r:.40}")
    settings = PackedSettings(
        quant_type=quant_type,
        blocksize=_blocksize(content, "blocksize"),
        dtype=_DTYPES[dtype],
        shape=tuple(shape),
        **({} if content.get("nested_blocksize") is None else _nested(content, is_stack=len(shape) == 3)),
    )
    if settings.is_stack and math.prod(shape[1:]) % settings.blocksize:
        raise ValueError(f"expected experts of whole blocks of {settings.blocksize}, found {shape[1:]} elements")
    return settings


def _nested(content: Mapping[str, Any], *, is_stack: bool) -> dict[str, Any]:
    """The settings of absmax that is quantized too."""
    if content.get("nested_dtype", "float32") != "float32":
        raise ValueError(f"nested_dtype {content['nested_dtype']!r:.40}, expected float32")
    if is_stack:
        if "nested_offset" in content:
            raise ValueError("nested_offset of a whole stack of experts, expected one for each, in a tensor")
        return {"nested_blocksize": _blocksize(content, "nested_blocksize")}
    offset: Any = content.get("nested_offset")
    # It is added to values in float32.
    if type(offset) not in (int, float) or not abs(offset) <= torch.finfo(torch.float32).max:
        raise ValueError(f"expected nested_offset to be a number that is finite in float32, found {offset!r:.40}")
    return {"nested_blocksize": _blocksize(content, "nested_blocksize"), "nested_offset": float(offset)}


def _blocksize(content: Mapping[str, Any], key: str) -> int:
    value = content[key]
    if type(value) is not int or value not in _BLOCKSIZES:
        raise ValueError(f"expected {key} to be one of {', '.join(map(str, _BLOCKSIZES))}, found {value!r:.40}")
    return value


def _broken(path: Path, name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"The packed weight {name} in {path} is not complete, or contradicts itself: {why}. Download the checkpoint "
        "again, or make it again from 16-bit weights (surgery quantize).",
        path=path,
        tensor=name,
    )
