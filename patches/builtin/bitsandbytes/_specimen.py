"""Small quantized Linear4bit layers on which probes try for a defect."""

from __future__ import annotations

from typing import Any

__all__ = ["meta_linear4bit", "packed_linear4bit", "partial_block_rows"]


def packed_linear4bit() -> Any:
    """Build a 64 x 64 Linear4bit on the CPU, nf4, stored as bfloat16; weight and layer share the quant_state.

    Assembled by hand: bitsandbytes quantizes on the CPU only from 0.46 on, and probes also run on older
    versions.
    """
    import torch
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    linear4bit: Any = Linear4bit  # Any: neither constructor is annotated
    quant_state: Any = QuantState
    # On meta, because the layer's own initialization would advance the caller's random generator.
    layer = linear4bit(
        64,
        64,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        quant_storage=torch.bfloat16,
        device="meta",
    )
    layer.quant_state = quant_state(
        absmax=torch.ones(64),
        shape=torch.Size((64, 64)),
        code=torch.linspace(-1, 1, 16),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    packed = torch.arange(2048, dtype=torch.int32).remainder(256).to(torch.uint8)
    layer.weight = Params4bit(
        packed.view(torch.bfloat16).view(-1, 1),
        requires_grad=False,
        quant_state=layer.quant_state,
        blocksize=64,
        compress_statistics=False,
        quant_type="nf4",
        quant_storage=torch.bfloat16,
        module=layer,
        bnb_quantized=True,
    )
    return layer


def meta_linear4bit() -> Any:
    """The same layer with its packed weight on meta; the quant_state stays on the CPU."""
    from bitsandbytes.nn.modules import Params4bit

    layer = packed_linear4bit()
    layer.weight = Params4bit(layer.weight.data.to("meta"), requires_grad=False, **vars(layer.weight))
    return layer


def partial_block_rows() -> tuple[Any, Any, Any]:
    """Build packed nf4 data, `(64, 1)` uint8, on the CPU, its quant_state, and the `(8, 16)` float32 weight that a
    code table look-up gives.

    Four rows make a block, and the two blocks have different statistics.
    """
    import torch
    from bitsandbytes.functional import QuantState, get_4bit_type

    packed = torch.arange(64, dtype=torch.int32).mul(37).remainder(256).to(torch.uint8)
    code, absmax = get_4bit_type("nf4", device="cpu"), torch.tensor([1.0, 2.0])
    make: Any = QuantState  # Any: its constructor is not annotated
    quant_state = make(
        absmax=absmax, shape=torch.Size((8, 16)), code=code, blocksize=64, quant_type="nf4", dtype=torch.float32
    )
    values = code[torch.stack((packed >> 4, packed & 15), dim=1).long()]  # the high half of a byte comes first
    return packed.view(-1, 1), quant_state, (values.view(2, 64) * absmax.view(2, 1)).view(8, 16)
