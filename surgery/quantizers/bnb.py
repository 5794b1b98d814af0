"""4-bit linear layers of bitsandbytes: quantization in runs of whole blocks, `Params4bit`, `quant_state`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

import model_surgery_patches as patches
from surgery.checkpoint import PackedSettings, PackedWeight, TensorEntry
from surgery.checkpoint.packed import INT8
from surgery.config import Quant, Quant8
from surgery.errors import ConfigError
from surgery.model.fqn import clean, join
from surgery.model.pretrained import is_pretrained, mark_quantized
from surgery.model.tree import is_conv1d, modules_of, was_conv1d
from surgery.model.twin import bare_copy
from surgery.quantizers.base import STATISTIC_BYTES, STATISTICS, Layout, QuantFormat
from surgery.quantizers.stack import NESTED_BLOCKSIZE, PackedStack, code_of, dequantized, dynamic_code, nested_values

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

__all__ = ["REMEDY", "STATE", "Bnb4bit", "as_params4bit", "is_params4bit", "linear4bits"]

#: Temporary bytes for each element that is being quantized: on a GPU the element itself, in 16 bits, its packed half
#: byte and its share of a statistic; on a CPU what bitsandbytes' kernel was seen to take.
QUANTIZE_BYTES = {"cpu": 16.0, "cuda": 2.57}

#: Bytes of a quant_state beside its statistics: tables of codes, offset, in blocks of the CUDA allocator.
STATE_BYTES = 2048

#: The name of the text in a checkpoint that says how to read the others, up to its 4-bit type.
STATE = "quant_state.bitsandbytes__"

#: The patch under which a CPU dequantizes right what it misreads.
REMEDY = "bitsandbytes.cpu-dequantize-flat"

#: Where the kernel that misreads is used: rows of a multiple of so many values, and smaller blocks than that. Elsewhere
#: the one that bitsandbytes has for any processor is, and right.
STEP, BLOCKSIZE_LIMIT = 16, 2048


def linear4bits(model: nn.Module) -> list[Linear4bit]:
    """Every `Linear4bit` of `model`, once each."""
    from bitsandbytes.nn import Linear4bit

    return [module for module in modules_of(model) if isinstance(module, Linear4bit)]


@functools.lru_cache(maxsize=64)
def _specimen(*sizes: int, **settings: Any) -> nn.Module:
    """A `Linear4bit` to copy, which takes a tenth of the time of making one: that draws initial values, on meta too."""
    from bitsandbytes.nn import Linear4bit

    return Linear4bit(*sizes, **settings)


def _quantize_blocks(run: torch.Tensor, quant: Quant) -> tuple[torch.Tensor, torch.Tensor]:
    """`(packed bytes, float32 absmax)` of a flat run of whole blocks (the last one of a weight may be partial)."""
    # The operator under `functional.quantize_4bit`, which also copies a table of codes to the device, and waits for it.
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(run, quant.blocksize, quant.quant_type, torch.uint8)
    return packed.reshape(-1), absmax


def _quant_states(
    absmaxes: Sequence[torch.Tensor], shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype], quant: Quant
) -> list[QuantState]:
    """The `QuantState`s that `quantize_4bit` would build from these statistics."""
    from bitsandbytes.functional import QuantState

    make = functools.partial(QuantState, blocksize=quant.blocksize, quant_type=quant.quant_type)
    codes = [code_of(quant.quant_type, absmax.device) for absmax in absmaxes]
    if not quant.double_quant:
        return [
            make(absmax, shape=shape, code=code, dtype=dtype)
            for absmax, shape, code, dtype in zip(absmaxes, shapes, codes, dtypes, strict=True)
        ]
    offsets = [absmax.mean() for absmax in absmaxes]
    nested = _quantize_statistics([absmax - offset for absmax, offset in zip(absmaxes, offsets, strict=True)])
    return [
        make(absmax, shape=shape, code=code, dtype=dtype, offset=offset, state2=state2)
        for (absmax, state2), shape, code, dtype, offset in zip(nested, shapes, codes, dtypes, offsets, strict=True)
    ]


def _quantize_statistics(statistics: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, QuantState]]:
    """The results of `quantize_blockwise(each, blocksize=256)`, by one kernel for all where blocks do not straddle."""
    whole = all(each.numel() % NESTED_BLOCKSIZE == 0 for each in statistics)
    groups = [statistics] if whole and len(statistics) > 1 else [[each] for each in statistics]
    return [found for group in groups for found in _quantize_together(group)]


def _quantize_together(statistics: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, QuantState]]:
    from bitsandbytes.functional import QuantState

    code = dynamic_code(statistics[0].device)
    together = torch.cat(list(statistics)) if len(statistics) > 1 else statistics[0]
    quantized, absmax = torch.ops.bitsandbytes.quantize_blockwise.default(together, code, NESTED_BLOCKSIZE)
    sizes = [each.numel() for each in statistics]
    parts = _apart(quantized, sizes), _apart(absmax, [-(-size // NESTED_BLOCKSIZE) for size in sizes])
    return [
        (part, QuantState(nested, code=code, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32))
        for part, nested in zip(*parts, strict=True)
    ]


def _apart(tensor: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Parts of so many elements of a 1-D tensor, each in memory of its own, as upstream's are."""
    return [tensor] if len(sizes) == 1 else [part.clone() for part in torch.split(tensor, list(sizes))]


def _absmax(state: QuantState, blocks: range) -> torch.Tensor:
    """The float32 statistics of `blocks`, which double quantization has made 8 bits of."""
    found: torch.Tensor = state.absmax[blocks.start : blocks.stop]
    if state.state2 is None:
        return found
    nested = state.state2
    return nested_values(
        found, nested.absmax, state.offset, blocks=blocks, code=nested.code, blocksize=nested.blocksize
    )


def _stored_code(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values` on `device`; one tensor for all weights that have the same, as `code_of`."""
    return _code_of(values.view(-1).numpy().tobytes(), device)


@functools.lru_cache(maxsize=16)
def _code_of(values: bytes, device: torch.device) -> torch.Tensor:
    return torch.frombuffer(bytearray(values), dtype=torch.float32).to(device)


def as_params4bit(
    data: torch.Tensor, module: nn.Module, quant: Quant, quant_state: QuantState | None = None
) -> nn.Parameter:
    """A frozen `Params4bit` over `data` (packed shape, any device), belonging to `module`; it counts as quantized."""
    from bitsandbytes.nn import Params4bit

    return Params4bit(
        data,
        requires_grad=False,
        quant_state=quant_state,
        blocksize=quant.blocksize,
        compress_statistics=quant.double_quant,
        quant_type=quant.quant_type,
        quant_storage=data.dtype,
        module=module,  # type: ignore[arg-type]  # only asked for what it is called
        bnb_quantized=True,
    )


def is_params4bit(parameter: torch.Tensor) -> bool:
    """Whether `parameter` is bitsandbytes' own kind, which carries how it is quantized."""
    from bitsandbytes.nn import Params4bit

    return isinstance(parameter, Params4bit)


class Bnb4bit(QuantFormat):
    """`Linear4bit` of bitsandbytes 0.47 and later (the first that quantizes every type on a CPU)."""

    label = "bitsandbytes 4-bit"
    resident_patches: ClassVar[tuple[str, ...]] = ("linear4bit-resident",)
    is_saved_upstream = False  # transformers refuses tensors that layers share, as these do tables of codes

    options: Quant

    @property
    def description(self) -> str:
        """The 4-bit type and its blocks."""
        return f"{self.options.quant_type} in blocks of {self.options.blocksize}"

    @property
    def storage(self) -> torch.dtype:
        """`quant_storage`, or the dtype of the model."""
        return self.options.storage_for(self.dtype)

    def takes(self, module: nn.Module) -> bool:
        """Whether `module` is a linear layer, or a `Linear4bit` that upstream has made on meta."""
        return super().takes(module) or (self.is_quantized(module) and not _is_packed(module))

    def replacement(self, module: Any) -> nn.Module:
        """A frozen `Linear4bit` on meta, its weight in packed shape; the module itself if it is one already.

        Its bias takes the dtype of the storage, unless it is kept in another one than the model's.
        """
        new = module if self.is_quantized(module) else self._linear4bit(module)
        packed = self.layout(new, "weight").packed_shape(self.logical(new, "weight"), self.storage)
        new.weight = as_params4bit(torch.empty(packed, dtype=self.storage, device="meta"), new, self.options)
        if self._shards_statistics(new):
            rows = self._stack(new).statistics_bytes // self.storage.itemsize
            statistics = torch.empty(rows, 1, dtype=self.storage, device="meta")
            new.register_parameter("weight" + STATISTICS, as_params4bit(statistics, new, self.options))
        bias = getattr(module, "bias", None)
        if bias is not None:
            # FSDP1 flattens weight and bias into one tensor, which has one dtype.
            as_stored = self.storage.is_floating_point and bias.dtype == self.dtype
            dtype = self.storage if as_stored else bias.dtype
            new.bias = nn.Parameter(torch.empty(bias.shape, dtype=dtype, device="meta"))
        new.train(module.training)
        new._is_hf_initialized = True  # as transformers sets it: what not to initialize
        frozen: nn.Module = new.requires_grad_(requires_grad=False)
        return frozen

    def _shards_statistics(self, module: Any) -> bool:
        """Whether the statistics of `module` are to be a parameter; those of a weight with a partial block are not."""
        whole = self.logical(module, "weight").numel() % self.options.blocksize == 0
        return self.options.shard_statistics and whole

    def _stack(self, module: Any, dtype: torch.dtype | None = None) -> PackedStack:
        """The layout of the weight of `module`, quantized in `dtype`, and of its statistics, as of one expert."""
        return PackedStack(
            experts=1,
            shape=(module.out_features, module.in_features),
            quant_type=self.options.quant_type,
            blocksize=self.options.blocksize,
            double_quant=self.options.double_quant,
            dtype=dtype or self.dtype,
        )

    def split_state(self, module: Any, name: str, state: QuantState) -> tuple[torch.Tensor, QuantState]:
        """The tensors of `state` as bytes, and a state that finds them in the parameter."""
        from surgery.quantizers.held_state import assembled, held_state

        stack = self._stack(module, state.dtype)
        return assembled(stack, state), held_state(module, stack)

    def state_ranges(self, state: Any, experts: range) -> dict[str, range]:
        """The sections of the state of a weight whose statistics are a parameter."""
        ranges: dict[str, range] = state.stack.ranges(experts)
        return ranges

    def state_from(self, state: Any, experts: range, found: Mapping[str, torch.Tensor]) -> QuantState:
        """The `QuantState` that `quantize_4bit` would have made."""
        from surgery.quantizers.held_state import whole_state

        return whole_state(state.stack, found)

    def _linear4bit(self, linear: Any) -> Any:
        out_features, in_features = linear.weight.shape[:: -1 if is_conv1d(linear) else 1]
        new: Any = bare_copy(
            _specimen(
                in_features,
                out_features,
                bias=getattr(linear, "bias", None) is not None,
                compute_dtype=self.compute_dtype,
                compress_statistics=self.options.double_quant,
                quant_type=self.options.quant_type,
                quant_storage=self.storage,
                device="meta",
            )
        )
        new.source_cls = type(linear)  # as transformers sets it: what to transpose when it saves
        return new

    @classmethod
    def is_quantized(cls, module: nn.Module) -> bool:
        """Whether `module` is a `Linear4bit`."""
        from bitsandbytes.nn import Linear4bit

        return isinstance(module, Linear4bit)

    def is_transposed(self, module: nn.Module) -> bool:
        """Whether `module` is transformers' `Conv1D`, or the `Linear4bit` that upstream has made of one."""
        return super().is_transposed(module) or was_conv1d(module)

    def layout(self, module: Any, name: str) -> Layout:
        """Two elements a byte, in blocks of `blocksize`."""
        return Layout(values_per_byte=2, blocksize=self.options.blocksize)

    def mark(self, model: nn.Module) -> None:
        """Set what transformers sets on a model that it loads in 4 bits, and what PEFT chooses its LoRA layer by."""
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
        if is_pretrained(model):
            mark_quantized(
                model,
                dtype=self.dtype,
                load_in_4bit=True,
                bnb_4bit_compute_dtype=self.compute_dtype or self.dtype,
                bnb_4bit_quant_type=self.options.quant_type,
                bnb_4bit_use_double_quant=self.options.double_quant,
                bnb_4bit_quant_storage=self.storage,
            )

    def quantize(
        self, run: torch.Tensor, layout: Layout, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed bytes and absmax, by the kernel under `bitsandbytes.functional.quantize_4bit`."""
        return _quantize_blocks(run.to(dtype or self.dtype), self.options)

    def dequantize(self, packed: torch.Tensor, start: int, state: QuantState) -> torch.Tensor:
        """The values in the dtype of `state`."""
        absmax = functools.partial(_absmax, state)
        return dequantized(
            packed, start, absmax, blocksize=state.blocksize, quant_type=state.quant_type, dtype=state.dtype
        )

    def states(
        self, statistics: Sequence[torch.Tensor], shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype | None]
    ) -> list[QuantState]:
        """The `QuantState`s that `quantize_4bit` would have made of the whole weights.

        With double quantization the statistics of a weight are quantized too, all together, because their mean is taken
        off first.
        """
        return _quant_states(statistics, shapes, [dtype or self.dtype for dtype in dtypes], self.options)

    def options_for(self, packing: PackedSettings) -> Quant | Quant8:
        """The options with the type, the blocks and the double quantization that are stored; those of 8 bits for int8.

        Raises `ConfigError` where others were asked for than those or the defaults, and for `skip_modules`.
        """
        if packing.quant_type == INT8:
            return self._in_8_bits(packing)
        stored: dict[str, Any] = {
            "quant_type": packing.quant_type,
            "blocksize": packing.blocksize,
            "double_quant": packing.double_quant,
        }
        default = Quant()
        for name, value in stored.items():
            asked = getattr(self.options, name)
            if asked not in (value, getattr(default, name)):
                raise ConfigError(
                    f"quant: asked for {name}={asked!r}, and the checkpoint is packed already, with {value!r}: leave "
                    "it out, or use the checkpoint in 16 bits that it was made from (or surgery dequantize)"
                )
        experts = self.options.experts
        if packing.is_stack and isinstance(experts, str) and experts != packing.quant_type:
            raise ConfigError(
                f"quant: asked for experts={experts!r}, and the checkpoint has them packed already, as "
                f"{packing.quant_type}: leave it out"
            )
        if self.options.skip_modules:
            raise ConfigError(
                "quant: skip_modules is for weights that are quantized here, and the checkpoint is packed already: "
                "leave it out, or use the checkpoint in 16 bits that it was made from (or surgery dequantize)"
            )
        return replace(self.options, **stored)

    def _in_8_bits(self, packing: PackedSettings) -> Quant8:
        storage = self.options.quant_storage
        if self.options != Quant(quant_storage=storage):
            raise ConfigError(
                f"quant: asked for 4 bits ({self.options}), and the checkpoint is packed already, in {packing.kind}: "
                "leave it out, or use the checkpoint in 16 bits that it was made from (or surgery dequantize)"
            )
        return Quant8(threshold=packing.threshold, quant_storage=storage)

    def stored_state(
        self, stored: PackedWeight, statistics: torch.Tensor, read: Callable[[TensorEntry], torch.Tensor]
    ) -> QuantState:
        """The `QuantState` that bitsandbytes makes of what is stored."""
        from bitsandbytes.functional import QuantState

        settings, device = stored.settings, statistics.device
        assert stored.quant_map is not None
        offset, state2 = None, None
        if stored.nested_absmax is not None and stored.nested_quant_map is not None:
            offset = torch.tensor(settings.nested_offset).to(device)
            state2 = QuantState(
                read(stored.nested_absmax).view(-1).to(device),
                code=_stored_code(read(stored.nested_quant_map), device),
                blocksize=settings.nested_blocksize,
                dtype=torch.float32,
            )
        return QuantState(
            statistics,
            shape=torch.Size(settings.shape),
            code=_stored_code(read(stored.quant_map), device),
            blocksize=settings.blocksize,
            quant_type=settings.quant_type,
            dtype=settings.dtype,
            offset=offset,
            state2=state2,
        )

    def parameter(self, module: Any, packed: torch.Tensor, state: QuantState) -> nn.Parameter:
        """A `Params4bit`."""
        return as_params4bit(packed, module, self.options, state)

    @staticmethod
    def like(parameter: Any, data: torch.Tensor) -> nn.Parameter:
        """A `Params4bit` with the same `quant_state`, or a plain parameter, as `parameter` is."""
        if not is_params4bit(parameter):
            return QuantFormat.like(parameter, data)
        from bitsandbytes.nn import Params4bit

        return Params4bit(
            data,
            requires_grad=False,
            quant_state=parameter.quant_state,
            blocksize=parameter.blocksize,
            compress_statistics=parameter.compress_statistics,
            quant_type=parameter.quant_type,
            quant_storage=parameter.quant_storage,
            module=parameter.module,
            bnb_quantized=True,
        )

    def saved_shapes(self, shape: torch.Size) -> dict[str, tuple[torch.dtype, tuple[int, ...]] | None]:
        """`absmax`, the tables of codes, and the text of `QuantState.as_dict(packed=True)`.

        Raises `ConfigError` for experts of another type.
        """
        if self.options.experts not in (True, False, self.options.quant_type):
            raise ConfigError(
                f"quant: a checkpoint has one kind of packed weights, found experts={self.options.experts!r} beside "
                f"{self.options.quant_type!r}: choose experts=True or False"
            )
        blocks = -(-shape.numel() // self.options.blocksize)
        found: dict[str, tuple[torch.dtype, tuple[int, ...]] | None] = {
            "absmax": (torch.uint8 if self.options.double_quant else torch.float32, (blocks,)),
            "quant_map": (torch.float32, (16,)),
        }
        if self.options.double_quant:
            found["nested_absmax"] = (torch.float32, (-(-blocks // NESTED_BLOCKSIZE),))
            found["nested_quant_map"] = (torch.float32, (256,))
        return {**found, f"{STATE}{self.options.quant_type}": None}

    def saved(self, state: Any) -> dict[str, torch.Tensor | str]:
        """The entries that bitsandbytes itself makes of `state`."""
        entries: dict[str, torch.Tensor] = state.as_dict(packed=True)
        return {
            name: bytes(tensor.tolist()).decode() if name.startswith(STATE) else tensor
            for name, tensor in entries.items()
        }

    def state_of(self, module: Any, name: str) -> QuantState:
        """The `quant_state` of the parameter, or the module's own where sharding took that away."""
        state: QuantState | None = getattr(module._parameters.get("weight"), "quant_state", None)
        own: QuantState = module.quant_state
        return own if state is None else state

    def state_tensors(self, state: Any) -> dict[str, torch.Tensor]:
        """`absmax`, `code`, `offset`, and those of the state of the statistics: `state2.absmax`."""
        if hasattr(state, "stack"):  # a parameter, and attested as that
            return {}
        found: dict[str, torch.Tensor] = {}
        for name, value in vars(state).items():
            if isinstance(value, torch.Tensor):
                found[name] = value
            elif type(value) is type(state):
                found.update((f"{name}.{inner}", tensor) for inner, tensor in self.state_tensors(value).items())
        return found

    def state_settings(self, state: Any) -> dict[str, str]:
        """The types, sizes and dtypes that say how to read the tensors."""
        if hasattr(state, "stack"):
            return {"stack": repr(state.stack)}
        found: dict[str, str] = {}
        for name, value in vars(state).items():
            if type(value) is type(state):
                found.update((f"{name}.{inner}", text) for inner, text in self.state_settings(value).items())
            elif not isinstance(value, torch.Tensor):
                found[name] = repr(value)
        return found

    def build_patches(self, model: nn.Module) -> tuple[Any, ...]:
        """`quant_state.to` as a no-op, for the states of this model."""
        states = [layer.quant_state for layer in linear4bits(model)]
        return (patches.on("bitsandbytes.quant-state-to-noop", states),) if states else ()

    def misread(self, model: nn.Module) -> list[str]:
        """FQNs of the 4-bit weights that bitsandbytes' kernel for a CPU dequantizes wrongly, ours and stock's alike.

        Their rows are not whole blocks. Empty where the processor has no such kernel, or `REMEDY` is active.
        """
        names = [
            clean(join(name, "weight"))
            for name, module in model.named_modules()
            if self.is_quantized(module) and self._has_partial_blocks(module)
        ]
        if not names or any(receipt.id == REMEDY for receipt in patches.active()):
            return []
        return names if str(patches.verdict(REMEDY)) == "needed" else []

    def _has_partial_blocks(self, layer: Any) -> bool:
        blocksize = getattr(layer.quant_state, "blocksize", self.options.blocksize)  # of a shard, which does not say it
        return bool(layer.in_features % blocksize) and layer.in_features % STEP == 0 and blocksize < BLOCKSIZE_LIMIT

    def state_bytes(self, blocks: int) -> int:
        """Bytes of the `quant_state` of a weight of so many blocks."""
        if self.options.shard_statistics:
            return 0
        if not self.options.double_quant:
            return blocks * STATISTIC_BYTES + STATE_BYTES
        return blocks + -(-blocks // NESTED_BLOCKSIZE) * STATISTIC_BYTES + STATE_BYTES

    def finishing_bytes(self, blocks: Sequence[int]) -> int:
        """Bytes of double quantization: statistics less their mean, twice, and as bytes, twice; of all weights at once.

        Without it those of statistics as parameters, if they are sharded.
        """
        if self.options.double_quant:
            return sum(blocks) * STATISTIC_BYTES * 5 // 2
        return sum(blocks) * STATISTIC_BYTES if self.options.shard_statistics else 0

    def quantizing_bytes(self, device: torch.device) -> float:
        """Temporary bytes for each element that is being quantized."""
        return QUANTIZE_BYTES.get(device.type, QUANTIZE_BYTES["cuda"])

    def dequantized_bytes(self, shape: torch.Size) -> int:
        """Bytes of the weight in 16 bits, and of its statistics in float32 if they are quantized too."""
        blocks = -(-shape.numel() // self.options.blocksize)
        return super().dequantized_bytes(shape) + (blocks * STATISTIC_BYTES if self.options.double_quant else 0)


def _is_packed(module: Any) -> bool:
    return bool(getattr(module.weight, "bnb_quantized", False))
