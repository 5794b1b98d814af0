"""`torch.fsdp2-params4bit`: the weight that FSDP2 gathers for a 4-bit layer is a Params4bit with its quant_state."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ...registry import REGISTRY
from ..bitsandbytes._packing import as_params4bit, is_quantized
from ..bitsandbytes._specimen import packed_linear4bit

__all__ = ["make_params4bit"]


def gathered_is_plain() -> bool:
    """Whether FSDP2 makes a plain Parameter of a gathered weight."""
    parameter = _specimen()
    parameter.init_unsharded_param()
    return not is_quantized(parameter._unsharded_param)


def check_makes_params4bit() -> None:
    """Raise RuntimeError if the weight is another one than that of the layer, or lacks its quant_state."""
    parameter = _specimen()
    layer, stored = parameter._module_info.module, parameter.all_gather_outputs[0]
    for _ in range(2):  # the second gather finds the weight there
        make_params4bit(parameter.init_unsharded_param, parameter, (), {})
        weight = parameter._unsharded_param
        if not is_quantized(weight) or weight.quant_state is not layer.quant_state:
            raise RuntimeError(f"expected a Params4bit with the quant_state of its layer, found {weight!r}")
        if weight.data_ptr() != stored.data_ptr():
            raise RuntimeError("expected the memory that the weight was gathered into, found a copy")


@REGISTRY.register(
    "torch.fsdp2-params4bit",
    target="torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam.init_unsharded_param",
    reason=(
        "FSDP2 gathers a packed weight into a plain Parameter without its quant_state, which state_dict, PEFT's merge "
        "and dequantization need, and for which each forward makes a new Parameter in its place"
    ),
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/fsdp/_fully_shard/_fsdp_param.py",
    requires={"torch": ">=2.6", "bitsandbytes": ">=0.44"},
    signature="(self)",
    subject=lambda parameter, _args, _kwargs: parameter._module_info.module,
    probe=gathered_is_plain,
    verify=check_makes_params4bit,
)
def make_params4bit(wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Make the gathered parameter, and make a Params4bit of it if it is the packed weight of a quantized Linear4bit.

    The data is not copied, and the object stays the same in all gathers. What does not have the packed shape, such as a
    bias, is left as it is.
    """
    wrapped(*args, **kwargs)
    place = instance._module_info
    quant_state = place.module.__dict__.get("quant_state")
    if quant_state is not None and place.param_name == "weight":
        as_params4bit(place.module, instance._unsharded_param, quant_state)


def _specimen() -> Any:
    """The FSDPParam of the weight of a 4-bit layer, which has just been gathered; made without a process group."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    layer = packed_linear4bit()
    packed = layer.weight.data
    parameter: Any = FSDPParam.__new__(FSDPParam)
    parameter._module_info = SimpleNamespace(module=layer, param_name="weight")
    parameter._orig_size, parameter._contiguous_orig_stride = packed.size(), packed.stride()
    parameter.all_gather_outputs = [packed.view(-1)]
    parameter.sharded_param = SimpleNamespace(_local_tensor=packed, requires_grad=False)
    parameter.is_dtensor, parameter._unsharded_dtensor_spec = False, None
    return parameter
