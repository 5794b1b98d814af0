"""Fused experts in 4 bits: the 3-D parameters of a mixture of experts, each expert quantized by itself."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from surgery.checkpoint import PackedWeight, TensorEntry
from surgery.config import Quant
from surgery.errors import ConfigError, QuantizerError
from surgery.model.fqn import join, match_any, split
from surgery.quantizers.base import STATISTIC_BYTES, STATISTICS, register
from surgery.quantizers.bnb import STATE, Bnb4bit, as_params4bit
from surgery.quantizers.grouped import DEQUANTIZED_BYTES
from surgery.quantizers.stack import NESTED_BLOCKSIZE, PackedStack, code_of, dynamic_code, stacks_of

__all__ = ["IMPLEMENTATION", "Experts4bit", "StackState", "fused_parameters", "has_experts", "left_out"]

#: The name under which `ExpertsInterface` of transformers finds the forward of these modules.
IMPLEMENTATION = "surgery_4bit"

#: The forward in the place of which it is, operation for operation.
REPLACED = "grouped_mm"

LEAVE = "Leave them in 16 bits: Quant(experts=False), --experts 16bit, or low_memory() without experts="

#: Classes that are taken for experts whose weights are parameters, with a forward of their own. Shared ones, which
#: every token goes through, are few.
EXPERTS = re.compile("(?<!shared)expert", re.IGNORECASE)

#: What a checkpoint calls the sections of statistics, where it is not as here.
SAVED = {"offset": "nested_offset"}


class StackState(NamedTuple):
    """The layout of a stack, and its statistics as bytes, uint8 and 1-D."""

    stack: PackedStack
    statistics: torch.Tensor


class Experts4bit(Bnb4bit):
    """Fused experts, in the storage and by the kernels of bitsandbytes' 4 bits.

    A module keeps its class, its flags and its biases. Each of its fused parameters `(experts, d1, d2)` becomes one of
    packed bytes, `(n, 1)`, expert after expert, and a second one of the bytes of its statistics (`PackedStack`).
    """

    label = "experts in 4 bits"
    needs_modules = False
    by_expert = True
    resident_patches: ClassVar[tuple[str, ...]] = ()
    lookup_patches = ("transformers.experts-4bit",)

    def __init__(self, options: Quant, *, dtype: torch.dtype, compute_dtype: torch.dtype | None = None) -> None:
        """Take the options. compute_dtype: of linear layers; experts multiply in `dtype`, as those in 16 bits do."""
        del compute_dtype
        chosen = options.experts if isinstance(options.experts, str) else options.quant_type
        super().__init__(dataclasses.replace(options, quant_type=chosen), dtype=dtype)

    def takes(self, module: nn.Module) -> bool:
        """Whether `module` is one of transformers' fused experts, with a weight that can be packed.

        Raises `ConfigError` for experts that are computed by another forward than the one that is replaced, so that
        nobody trains with most of the model in 16 bits, or with other products, unawares.
        """
        if not self.options.experts or self.is_quantized(module):
            return False
        if is_foreign(module):
            raise ConfigError(
                f"{type(module).__name__} holds its experts as parameters, with a forward of its own that transformers "
                f"does not let others replace: they cannot be had in 4 bits. {LEAVE}"
            )
        takes = bool(self._stacks(module))
        chosen = _implementation(module)
        if takes and chosen not in {None, REPLACED}:
            raise ConfigError(
                f"{type(module).__name__} is computed by experts_implementation={chosen!r}, by its class's choice or "
                f"that of who loads it, and in 4 bits as {REPLACED!r} would, which rounds otherwise. {LEAVE}, or load "
                f"it with experts_implementation={REPLACED!r}"
            )
        return takes

    def replacement(self, module: Any) -> nn.Module:
        """`module` itself, its weights packed, on meta; those of which blocks would straddle experts stay."""
        stacks = self._stacks(module)
        for name, stack in stacks.items():
            packed = self.layout(module, name).packed_shape(stack.size, self.storage)
            statistics = stack.statistics_bytes // self.storage.itemsize, 1
            for each, shape in ((name, packed), (name + STATISTICS, statistics)):
                data = torch.empty(shape, dtype=self.storage, device="meta")
                module._parameters[each] = as_params4bit(data, module, self.options)
        self.announce(module, stacks)
        module.config = copy.copy(module.config)
        module.config._experts_implementation_internal = IMPLEMENTATION
        frozen: nn.Module = module.requires_grad_(requires_grad=False)
        return frozen

    def _stacks(self, module: nn.Module) -> dict[str, PackedStack]:
        """The packing of those weights of `module`, which is not replaced yet, whose blocks straddle no experts."""
        shapes = {name: module.get_parameter(name).shape for name in fused_parameters(module)}
        whole = {name: shape for name, shape in shapes.items() if shape[1:].numel() % self.options.blocksize == 0}
        return {name: self.stack(shape) for name, shape in whole.items()}

    def stack(self, shape: Sequence[int]) -> PackedStack:
        """The packing of a fused parameter of `shape`, `(experts, d1, d2)`."""
        experts, *each = shape
        return PackedStack(
            experts=experts,
            shape=(each[0], each[1]),
            quant_type=self.options.quant_type,
            blocksize=self.options.blocksize,
            double_quant=self.options.double_quant,
            dtype=self.dtype,
        )

    def rehearse(self, module: Any) -> None:
        """Have `module`, a copy on meta with weights in their own shapes, say what is packed in the model."""
        self.announce(module, self._stacks(module))

    def announce(self, module: Any, stacks: dict[str, PackedStack]) -> None:
        """Note on `module` what is packed, and how."""
        module.packed_stacks = stacks
        module.quant_storage = self.storage
        module.quant_state = stacks  # by which `torch.fsdp2-bit-exact-gather` knows a layer of packed bytes

    @classmethod
    def is_quantized(cls, module: nn.Module) -> bool:
        """Whether `module` is one of fused experts that `replacement` has changed."""
        return bool(stacks_of(module))

    @classmethod
    def weight_names(cls, module: nn.Module) -> tuple[str, ...]:
        """The fused parameters that are packed."""
        return tuple(stacks_of(module))

    def logical(self, module: Any, name: str) -> torch.Size:
        """`(experts, d1, d2)`."""
        return stacks_of(module)[name].size

    def is_transposed(self, module: nn.Module) -> bool:
        """False: experts are packed as their class stores them."""
        return False

    def mark(self, model: nn.Module) -> None:
        """Nothing: transformers has no word for it."""

    def parameter(self, module: Any, packed: torch.Tensor, state: Any) -> nn.Parameter:
        """A `Params4bit`, which others leave in its dtype, without a state, which it would move with itself."""
        return as_params4bit(packed, module, self.options)

    def split_state(self, module: Any, name: str, state: Any) -> tuple[torch.Tensor, Any]:
        """The bytes of the statistics of all experts, and how to read them."""
        return state.statistics, state.stack

    def set_state(self, module: Any, name: str, state: PackedStack) -> None:
        """Nothing: `module` knows its stacks from the beginning."""

    def state_of(self, module: Any, name: str) -> Any:
        """The layout of the weight and its statistics."""
        return stacks_of(module)[name]

    def state_tensors(self, state: Any) -> dict[str, torch.Tensor]:
        """None: statistics are a parameter, and attested as that."""
        return {}

    def state_settings(self, state: Any) -> dict[str, str]:
        """The fields of the layout."""
        return {each.name: repr(getattr(state, each.name)) for each in dataclasses.fields(state)}

    def states(
        self, statistics: Sequence[torch.Tensor], shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype | None]
    ) -> list[Any]:
        """Layouts and bytes; with double quantization the statistics of each expert are quantized by themselves."""
        return [self._state(each, shape) for each, shape in zip(statistics, shapes, strict=True)]

    def _state(self, absmax: torch.Tensor, shape: torch.Size) -> StackState:
        stack = self.stack(shape)
        if not self.options.double_quant:
            return StackState(stack, stack.assemble({"absmax": absmax}))
        each = list(absmax.view(stack.experts, -1).unbind())
        states = super().states(each, [torch.Size(stack.shape)] * stack.experts, [self.dtype] * stack.experts)
        sections = {
            "absmax": torch.cat([state.absmax for state in states]),
            "nested_absmax": torch.cat([state.state2.absmax for state in states]),
            "offset": torch.stack([state.offset for state in states]),
        }
        return StackState(stack, stack.assemble(sections))

    def stored_state(
        self, stored: PackedWeight, statistics: torch.Tensor, read: Callable[[TensorEntry], torch.Tensor]
    ) -> Any:
        """The layout, and the sections that are stored. Raises `QuantizerError` for other codes than bitsandbytes'."""
        device = statistics.device
        stack = self.stack(stored.settings.shape)
        codes = {stored.quant_map: code_of(stack.quant_type, torch.device("cpu"))}
        sections = {"absmax": statistics}
        if stored.nested_absmax is not None and stored.nested_offset is not None:
            codes[stored.nested_quant_map] = dynamic_code(torch.device("cpu"))
            sections["nested_absmax"] = read(stored.nested_absmax).view(-1).to(device)
            sections["offset"] = read(stored.nested_offset).view(-1).to(device)
        for entry, code in codes.items():
            if entry is not None and not torch.equal(read(entry).view(-1), code):
                raise QuantizerError(
                    f"{entry.name}: expected the values that bitsandbytes has for {stack.quant_type}, by which its "
                    "kernels read experts, found others: write the checkpoint in 16 bits (surgery dequantize)"
                )
        return StackState(stack, stack.assemble(sections))

    def dequantize(self, packed: torch.Tensor, start: int, state: Any) -> torch.Tensor:
        """The values in the dtype of the stack."""
        values: torch.Tensor = state.stack.elements(packed, start, state.statistics)
        return values

    def saved_shapes(self, shape: torch.Size) -> dict[str, tuple[torch.dtype, tuple[int, ...]] | None]:
        """The sections of all experts, the tables of codes, and a text."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]] | None] = {
            SAVED.get(name, name): (section.dtype, (section.elements,))
            for name, section in self.stack(shape).sections.items()
        }
        found["quant_map"] = (torch.float32, (16,))
        if self.options.double_quant:
            found["nested_quant_map"] = (torch.float32, (256,))
        return {**found, f"{STATE}{self.options.quant_type}": None}

    def saved(self, state: StackState) -> dict[str, torch.Tensor | str]:
        """The sections of all experts, and what they share."""
        return {**self.saved_by_expert(state), **self.saved_once(state.stack.size)}

    def saved_by_expert(self, state: StackState) -> dict[str, torch.Tensor]:
        """The sections, under the names that a checkpoint has for them."""
        return {SAVED.get(name, name): section for name, section in state.stack.views(state.statistics).items()}

    def saved_once(self, shape: torch.Size) -> dict[str, torch.Tensor | str]:
        """The tables of codes, and a text as bitsandbytes writes it."""
        stack = self.stack(shape)
        found: dict[str, torch.Tensor | str] = {"quant_map": code_of(stack.quant_type, torch.device("cpu"))}
        settings: dict[str, Any] = {
            "quant_type": stack.quant_type,
            "blocksize": stack.blocksize,
            "dtype": str(stack.dtype).removeprefix("torch."),
            "shape": list(shape),
        }
        if stack.double_quant:
            found["nested_quant_map"] = dynamic_code(torch.device("cpu"))
            settings |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
        return {**found, f"{STATE}{stack.quant_type}": json.dumps(settings)}

    def state_ranges(self, state: PackedStack, experts: range) -> dict[str, range]:
        """The part of each section."""
        return state.ranges(experts)

    def state_from(self, state: Any, experts: range, found: Mapping[str, torch.Tensor]) -> Any:
        """A stack of `experts`."""
        stack = dataclasses.replace(state, experts=len(experts))
        return StackState(stack, stack.assemble(stack.typed(found)))

    def state_bytes(self, blocks: int) -> int:
        """0: statistics are a parameter."""
        return 0

    def finishing_bytes(self, blocks: Sequence[int]) -> int:
        """Bytes of the statistics of all stacks as parameters, and of double quantization of one after the other."""
        if not self.options.double_quant:
            return sum(blocks) * STATISTIC_BYTES
        return sum(blocks) + super().finishing_bytes([max(blocks)])

    def dequantized_bytes(self, shape: torch.Size) -> int:
        """Bytes of a run of experts: within the budget of their forward, and one at least."""
        _, *expert = shape
        of_one = super().dequantized_bytes(torch.Size(expert))
        return min(shape[0], max(1, DEQUANTIZED_BYTES // of_one)) * of_one

    def build_patches(self, model: nn.Module) -> tuple[Any, ...]:
        """None: statistics are a parameter, which moves with the weight."""
        return ()

    def misread(self, model: nn.Module) -> list[str]:
        """None: experts are dequantized flat, which every kernel does right."""
        return []

    def left_out(self, model: nn.Module) -> list[str]:
        """FQNs of fused weights that stay in 16 bits, and that nobody has asked to leave so.

        Blocks would straddle experts; or they are beside packed weights, or a module's that its class keeps.
        """
        if not self.options.experts:
            return []
        return [name for name in left_out(model) if not match_any(split(name)[0], self.skip_modules)]


def fused_parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of the fused 3-D weights of `module`, if it is one of transformers' experts that can be dispatched."""
    if not hasattr(module, "is_concatenated") or not hasattr(module, "has_gate"):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    held = ((name, module._parameters.get(name)) for name in names)
    return tuple(name for name, parameter in held if parameter is not None and parameter.dim() == 3)


def _implementation(module: Any) -> str | None:
    """The name of the forward that is chosen for the experts of `module`; None if nobody has."""
    return getattr(getattr(module, "config", None), "_experts_implementation", None)


def is_foreign(module: nn.Module) -> bool:
    """Whether `module` looks like fused experts that transformers does not dispatch."""
    if not EXPERTS.search(type(module).__name__) or fused_parameters(module) or stacks_of(module):
        return False
    # DBRX has them in two dimensions.
    held = any(p is not None and p.is_floating_point() and p.dim() >= 2 for p in module._parameters.values())
    return held and not isinstance(module, (nn.Linear, nn.Embedding))


def has_experts(model: nn.Module) -> bool:
    """Whether `model` has fused experts, of a kind that can be packed or of another."""
    return any(fused_parameters(module) or is_foreign(module) for module in model.modules())


def left_out(model: nn.Module) -> list[str]:
    """FQNs of the fused weights of `model` that are not packed."""
    return [join(prefix, name) for prefix, module in model.named_modules() for name in fused_parameters(module)]


register(Quant, Bnb4bit, Experts4bit)
