"""The seam between loading and storage: what a format answers, and which format serves which options.

Everything that differs by how weights are stored is a method of `QuantFormat`. A new format is one file with a
subclass, and one `register` line; ranks divide, read and exchange weights by what its `layout` says. The same options
may have several formats, each for modules of another kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from surgery.checkpoint import PackedSettings, PackedWeight, TensorEntry
from surgery.errors import ConfigError, QuantizerError
from surgery.model.fqn import join
from surgery.model.tree import is_conv1d, is_linear_like, modules_of

__all__ = [
    "STATISTICS",
    "Layout",
    "QuantFormat",
    "check_layout",
    "check_run",
    "format_for",
    "format_of",
    "formats_for",
    "kept_parameters",
    "packed_names",
    "quantized_modules",
    "register",
]

#: Elements quantized at a time, unless a format says other. On a CPU, where bitsandbytes' kernel takes some 16 bytes of
#: temporaries for each, 2 MiB: no slower than more, and glibc gives less of it back to ask for it again (half the page
#: faults). On a GPU 128 MiB of a 16-bit weight, so that most parts are one run.
RUN_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}

#: Bytes of a statistic as it is computed and exchanged: float32.
STATISTIC_BYTES = 4

#: The end of the name of a parameter that holds the state of another one, which is sharded with it.
STATISTICS = "_statistics"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The packing of one weight: its elements in flat order, so many to a byte.

    values_per_byte: 2 for 4 bits, 1 for 8. blocksize: elements that share one float32 statistic, a multiple of
    `values_per_byte`. The last byte and the last block of a weight may be partial.
    """

    values_per_byte: int
    blocksize: int

    def packed_bytes(self, numel: int) -> int:
        """Bytes that `numel` elements pack into."""
        return -(-numel // self.values_per_byte)

    def blocks(self, numel: int) -> int:
        """Number of statistics of `numel` elements."""
        return -(-numel // self.blocksize)

    def whole_blocks(self, elements: int) -> int:
        """Round `elements` down to whole blocks, one at least."""
        return max(elements // self.blocksize, 1) * self.blocksize

    def packed_shape(self, shape: Sequence[int], storage: torch.dtype) -> tuple[int, int]:
        """Shape `(n, 1)` of the packed form, in elements of `storage`, of a weight of logical `shape`.

        Raises `ConfigError` where the bytes do not fill the last element of `storage`.
        """
        size = self.packed_bytes(torch.Size(shape).numel())
        if size % storage.itemsize:
            raise ConfigError(
                f"a weight of shape {tuple(shape)} packs into {size} bytes, which {storage} ({storage.itemsize} bytes "
                "an element) cannot hold: choose a smaller quant_storage, or leave the module in 16 bits with "
                "skip_modules"
            )
        return size // storage.itemsize, 1


class QuantFormat:
    """A way to store the weights of a model, and to make them of what a checkpoint has.

    A subclass defines `replacement`, `is_quantized`, `layout` and `quantize`, and what differs from the defaults here:
    packed weights are plain parameters `(n, 1)` of dtype `storage`; a module keeps its state in `quant_state`.

    options: what the user chose, such as `surgery.Quant("nf4")`. dtype: of the model; weights are cast to it before
    they are quantized. compute_dtype: in which quantized linear layers multiply.
    """

    #: What plans and reports call it.
    label: ClassVar[str]

    #: Patches that a model in this format needs in order to run, on its quantized modules.
    resident_patches: ClassVar[tuple[str, ...]] = ()

    #: Patches that it needs in order to run, and that are not of single modules.
    lookup_patches: ClassVar[tuple[str, ...]] = ()

    #: Whether `save_pretrained` of transformers can write them.
    is_saved_upstream: ClassVar[bool] = True

    def __init__(self, options: Any, *, dtype: torch.dtype, compute_dtype: torch.dtype | None = None) -> None:
        self.options = options
        self.dtype = dtype
        self.compute_dtype = compute_dtype

    @property
    def description(self) -> str:
        """The format with its options, for people."""
        return self.label

    @property
    def storage(self) -> torch.dtype:
        """Dtype of packed tensors; the same bytes whatever it is."""
        return self.dtype

    @property
    def skip_modules(self) -> tuple[str, ...]:
        """Regular expressions, searched in a module's FQN; what matches stays as it is."""
        return tuple(getattr(self.options, "skip_modules", ()))

    # Modules. --------------------------------------------------------------------------------------------------------

    #: Whether it packs weights that are in 16 or 32 bits; else it loads only what a checkpoint has packed.
    quantizes: ClassVar[bool] = True

    #: Whether a model without a module to quantize is refused.
    needs_modules: ClassVar[bool] = True

    def takes(self, module: nn.Module) -> bool:
        """Whether `module` has a quantized form: exactly `nn.Linear`, or transformers' transposed `Conv1D`."""
        return is_linear_like(module)

    def replacement(self, module: Any) -> nn.Module:
        """A frozen quantized module in the place of `module`, on meta, its weight `(n, 1)` in `storage`."""
        raise NotImplementedError(_undefined(self))

    def rehearse(self, module: Any) -> None:
        """Have `module`, a copy on meta of one that it takes, with weights in their own shapes, be known to be packed.

        For formats whose adapters depend on it; PEFT is tried on such a copy.
        """

    @classmethod
    def is_quantized(cls, module: nn.Module) -> bool:
        """Whether `module` is one of this format's, and its weights are packed."""
        return False

    @classmethod
    def weight_names(cls, module: nn.Module) -> tuple[str, ...]:
        """The names of the packed weights of a quantized `module`."""
        return ("weight",)

    def logical(self, module: Any, name: str) -> torch.Size:
        """Shape of the weight `name` of a quantized `module` before it was quantized: `(out, in)`."""
        return torch.Size((module.out_features, module.in_features))

    def is_transposed(self, module: nn.Module) -> bool:
        """Whether the checkpoint has the weight of `module`, which is not replaced yet, as `(in, out)`."""
        return is_conv1d(module)

    def layout(self, module: Any, name: str) -> Layout:
        """The packing of the weight `name` of a quantized `module`."""
        raise NotImplementedError(_undefined(self))

    def mark(self, model: nn.Module) -> None:
        """Set on `model`, its modules replaced, what upstream sets on a model that it loads in this format."""

    # Values. ---------------------------------------------------------------------------------------------------------

    def run_elements(self, device: torch.device) -> int:
        """Approximate number of elements to quantize at once on `device`; runs are of whole blocks."""
        return RUN_ELEMENTS.get(device.type, RUN_ELEMENTS["cuda"])

    def quantize(
        self, run: torch.Tensor, layout: Layout, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(packed, statistics)` of a flat run of whole blocks, in any floating dtype, on its device.

        Both are 1-D: uint8 with `layout.packed_bytes(n)` elements, float32 with `layout.blocks(n)`. Only the last block
        of a weight may be partial. The run is cast first, to `dtype`, or to the model's where that is None.
        """
        raise NotImplementedError(_undefined(self))

    def dequantize(self, packed: torch.Tensor, start: int, state: Any) -> torch.Tensor:
        """The values, 1-D, that forward has of the bytes `packed`, which begin at flat element `start` of a weight.

        packed: uint8, 1-D, on the device of `state`, which is that of the whole weight. For adapters that are made of
        base weights; they are refused for a format that does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define dequantize")

    def states(
        self, statistics: Sequence[torch.Tensor], shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype | None]
    ) -> list[Any]:
        """The states of whole weights of logical `shapes`, each from the statistics of all its blocks, in order.

        dtypes: in which each was quantized; None for the model's. Many weights at once are little more work than one.
        """
        return list(statistics)

    def options_for(self, packing: PackedSettings) -> Any:
        """The options of this format for weights that a checkpoint has packed so, and that are not quantized again.

        Raises `ConfigError` where it cannot hold them.
        """
        raise ConfigError(
            f"expected weights in 16 or 32 bits for {self.label}, found packed ones ({packing.kind}): "
            "use surgery.Quant(), or write them in 16 bits first (surgery dequantize)"
        )

    def split_state(self, module: Any, name: str, state: Any) -> tuple[torch.Tensor, Any]:
        """The state of the weight `name` of `module` as bytes, uint8 and 1-D, and what of it is no tensor.

        For a module that has a parameter `<name>_statistics`, `(n, 1)`, on meta, by `replacement`: the bytes are
        sharded with the weight. Of another module every rank keeps the state whole (`set_state`).
        """
        raise NotImplementedError(f"{type(self).__name__} must define split_state, since it has such parameters")

    def stored_state(
        self, stored: PackedWeight, statistics: torch.Tensor, read: Callable[[TensorEntry], torch.Tensor]
    ) -> Any:
        """The state of a weight that the checkpoint has packed; `statistics` are its absmax, whole, on the device.

        read: reads a whole tensor of the checkpoint to the CPU.
        """
        raise NotImplementedError(f"{type(self).__name__} must define stored_state, since it defines options_for")

    def parameter(self, module: Any, packed: torch.Tensor, state: Any) -> nn.Parameter:
        """The frozen parameter of a quantized `module` over `packed`; `state` is what `states` gave."""
        return nn.Parameter(packed, requires_grad=False)

    def set_state(self, module: Any, name: str, state: Any) -> None:
        """Give `module` the state of its weight `name`, which it keeps whatever becomes of the parameter."""
        module.quant_state = state

    def finish(self, model: nn.Module) -> None:
        """Change the quantized modules of `model`, filled, whose parameters stay whole and as they are from here on."""

    @staticmethod
    def like(parameter: Any, data: torch.Tensor) -> nn.Parameter:
        """A parameter of the same kind as `parameter`, of any module, with the same state, over `data`."""
        return nn.Parameter(data, requires_grad=parameter.requires_grad)

    # Files. ----------------------------------------------------------------------------------------------------------

    def saved_shapes(self, shape: torch.Size) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]] | None]:
        """Dtype and shape of what a checkpoint has beside a packed weight of logical `shape`, by the ends of names.

        None for a text, as bytes, whose length depends on values.
        """
        raise ConfigError(f"{self.label} has no form on disk: choose quant=surgery.Quant(...)")

    def saved(self, state: Any) -> Mapping[str, torch.Tensor | str]:
        """The tensors and texts of `saved_shapes`, of the state of one weight."""
        raise ConfigError(f"{self.label} has no form on disk: choose quant=surgery.Quant(...)")

    #: Whether a weight is a stack `(experts, d1, d2)`, of which each expert is packed by itself.
    by_expert: ClassVar[bool] = False

    def state_ranges(self, state: Any, experts: range) -> Mapping[str, range]:
        """The bytes, of statistics that are a parameter, that are those of consecutive `experts`, by name.

        state: what `state_of` gives. experts: of a weight that is no stack the only one.
        """
        raise NotImplementedError(f"{type(self).__name__} must define state_ranges, since it has such parameters")

    def state_from(self, state: Any, experts: range, found: Mapping[str, torch.Tensor]) -> Any:
        """The state of these experts alone, as `states` gives it, of the bytes of its `state_ranges`."""
        raise NotImplementedError(f"{type(self).__name__} must define state_from, since it has such parameters")

    def saved_by_expert(self, state: Any) -> Mapping[str, torch.Tensor]:
        """Those tensors of `saved` of which each expert has an equal part, in order."""
        raise NotImplementedError(f"{type(self).__name__} must define saved_by_expert, since it packs by expert")

    def saved_once(self, shape: torch.Size) -> Mapping[str, torch.Tensor | str]:
        """The others, of a stack of `shape`."""
        raise NotImplementedError(f"{type(self).__name__} must define saved_once, since it packs by expert")

    # Attestation. ----------------------------------------------------------------------------------------------------

    def state_of(self, module: Any, name: str) -> Any:
        """The state of the weight `name` that forward of a quantized `module` uses."""
        return module.quant_state

    def state_tensors(self, state: Any) -> Mapping[str, torch.Tensor]:
        """The tensors of a state by name; to be defined where a state is not one tensor."""
        if not isinstance(state, torch.Tensor):
            raise QuantizerError(
                f"{type(self).__name__}.state_tensors: expected a tensor for a state, found a {type(state).__name__}: "
                "define it for states of this format, so that they can be attested"
            )
        return {"statistics": state}

    def state_settings(self, state: Any) -> Mapping[str, str]:
        """Everything else that a state says of how to read the tensors, as text by name."""
        return {}

    # Upstream's faults. ----------------------------------------------------------------------------------------------

    def build_patches(self, model: nn.Module) -> tuple[Any, ...]:
        """Patches, as `patches.transaction` takes them, while PEFT or FSDP rebuild `model`."""
        return ()

    def misread(self, model: nn.Module) -> list[str]:
        """FQNs of the weights of `model` that upstream takes for others on this machine."""
        return []

    def left_out(self, model: nn.Module) -> list[str]:
        """FQNs of the weights of `model` that stay as they are against expectation, its modules replaced."""
        return []

    # The memory plan. ------------------------------------------------------------------------------------------------

    def state_bytes(self, blocks: int) -> int:
        """Bytes of the state of a weight of so many blocks, as every rank has it."""
        return blocks * STATISTIC_BYTES

    def finishing_bytes(self, blocks: Sequence[int]) -> int:
        """Bytes that `states` and `split_state` take for weights of so many blocks each, beside float32 statistics."""
        return 0

    def quantizing_bytes(self, device: torch.device) -> float:
        """Temporary bytes for each element that is being quantized on `device`."""
        return 8.0

    def dequantized_bytes(self, shape: torch.Size) -> int:
        """Temporary bytes of a weight of logical `shape` while it multiplies."""
        return shape.numel() * (self.compute_dtype or self.dtype).itemsize


def _undefined(quant: QuantFormat) -> str:
    return f"{type(quant).__name__} must define replacement, is_quantized, layout and quantize"


_FORMATS: dict[type, tuple[type[QuantFormat], ...]] = {}


def register(options: type, *kinds: type[QuantFormat]) -> None:
    """Have `kinds` serve every `quant=` of the class `options`; the first is the one that plans and reports name."""
    _FORMATS[options] = kinds


def formats_for(
    options: Any, *, dtype: torch.dtype, compute_dtype: torch.dtype | None = None
) -> tuple[QuantFormat, ...]:
    """The formats that serve `options`; raises `ConfigError` if none does."""
    kinds = _FORMATS.get(type(options))
    if kinds is None:
        known = ", ".join(each.__name__ for each in _FORMATS if each is not type(None))
        raise ConfigError(
            f"quant: expected None or one of {known}; got {options!r:.80}. A format of your own is known once a module "
            "is imported that calls surgery.quantizers.base.register for it"
        )
    return tuple(kind(options, dtype=dtype, compute_dtype=compute_dtype) for kind in kinds)


def format_for(options: Any, *, dtype: torch.dtype, compute_dtype: torch.dtype | None = None) -> QuantFormat:
    """The first of the formats that serve `options`; raises `ConfigError` if there is none."""
    return formats_for(options, dtype=dtype, compute_dtype=compute_dtype)[0]


def format_of(module: nn.Module) -> type[QuantFormat] | None:
    """The format that `module` is in; None if it is not quantized."""
    return next((kind for kinds in _FORMATS.values() for kind in kinds if kind.is_quantized(module)), None)


def packed_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of `module` that are bytes, not numbers: packed weights, and their statistics."""
    kind = format_of(module)
    names = () if kind is None else kind.weight_names(module)
    return (*names, *(each for name in names if (each := name + STATISTICS) in module._parameters))


def quantized_modules(model: nn.Module) -> list[nn.Module]:
    """Every quantized module of `model`, once each, whatever its format."""
    every = modules_of(model)
    kinds = {kind for kinds in _FORMATS.values() for kind in kinds}
    found = set[nn.Module]().union(*(filter(kind.is_quantized, every) for kind in kinds))
    return [module for module in every if module in found]


def kept_parameters(model: nn.Module, dtype: torch.dtype, *, ends: bool = True) -> dict[str, nn.Parameter]:
    """Floating-point parameters of `model`, by FQN, that are neither in `dtype`, the model's, nor packed.

    Upstream keeps them so. ends: with those of the embedding and of the output head, which may be large.
    """
    named = ("get_input_embeddings", "get_output_embeddings")
    left_out = set() if ends else {getattr(model, name, lambda: None)() for name in named}
    return {
        join(prefix, name): parameter
        for prefix, module in model.named_modules()
        if module not in left_out
        for name, parameter in _floating(module)
        if parameter.dtype not in _stored(module, dtype)
    }


def _floating(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    yield from ((name, p) for name, p in module._parameters.items() if p is not None and p.is_floating_point())


def _stored(module: nn.Module, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes of what `module` holds if upstream keeps none of it in another one."""
    held = (module._parameters.get(name) for name in packed_names(module))
    return (dtype, *(parameter.dtype for parameter in held if parameter is not None))


def check_layout(quant: QuantFormat, fqn: str, stored: torch.Tensor, logical: torch.Size, layout: Layout) -> None:
    """Raise `QuantizerError` where the weight `fqn`, of shape `logical`, is `stored` on meta in another layout."""
    name = type(quant).__name__
    if layout.values_per_byte < 1 or layout.blocksize < 1 or layout.blocksize % layout.values_per_byte:
        raise QuantizerError(
            f"{name}: expected a blocksize of whole bytes, {layout.values_per_byte} elements each, found "
            f"{layout.blocksize}: choose a multiple"
        )
    expected, found = layout.packed_bytes(logical.numel()), stored.numel() * stored.dtype.itemsize
    if found != expected or stored.shape[1:].numel() != 1:
        raise QuantizerError(
            f"{name}: expected {fqn}, of shape {tuple(logical)}, to be stored as (n, 1) in {expected} bytes, "
            f"{layout.values_per_byte} elements a byte; found {tuple(stored.shape)} of {stored.dtype}, {found} bytes: "
            "make `replacement` keep to what `layout` says"
        )


def check_run(
    quant: QuantFormat, fqn: str, numel: int, made: tuple[torch.Tensor, torch.Tensor], layout: Layout
) -> None:
    """Raise `QuantizerError` where what `quantize` has `made` of a run of `fqn` is not as `layout` says."""
    expected = (
        _described(torch.uint8, layout.packed_bytes(numel)),
        _described(torch.float32, layout.blocks(numel)),
    )
    found = tuple(f"{each.dtype} {tuple(each.shape)}" for each in made)
    if found != expected:
        raise QuantizerError(
            f"{type(quant).__name__}: expected `quantize` to make of {numel} elements of {fqn} packed data "
            f"{expected[0]}, {layout.values_per_byte} elements a byte, and statistics {expected[1]}, one for each "
            f"block of {layout.blocksize}; found {found[0]} and {found[1]}"
        )


def _described(dtype: torch.dtype, size: int) -> str:
    return f"{dtype} {(size,)}"
