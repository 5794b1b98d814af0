"""The Triton kernel that dequantizes a packed 4-bit weight. Imports Triton; nothing else here does."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

__all__ = ["BYTES", "unpack"]

#: Packed bytes that one program reads.
BYTES = 1024


@triton.jit
def unpack(  # noqa: PLR0917 - arguments of a kernel are positional
    packed,  # noqa: ANN001 - pointers: uint8; absmax float32, or uint8 if NESTED; float32 tables and offset; the output
    absmax,  # noqa: ANN001
    code,  # noqa: ANN001
    nested_absmax,  # noqa: ANN001
    nested_code,  # noqa: ANN001
    offset,  # noqa: ANN001
    out,  # noqa: ANN001
    elements,  # noqa: ANN001
    BLOCKSIZE: tl.constexpr,  # noqa: N803
    NESTED: tl.constexpr,  # noqa: N803
    BYTES: tl.constexpr,  # noqa: N803
) -> None:
    """Write `elements` values, two of each byte, the high half first; each product is rounded by itself.

    BLOCKSIZE: elements that share a statistic. NESTED: statistics that share one of their own; 0 without those.
    """
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = 2 * byte < elements
    both = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    block = 2 * byte // BLOCKSIZE
    scale = tl.load(absmax + block, mask=inside, other=0)
    if NESTED > 0:
        own = tl.load(nested_code + scale.to(tl.int32))
        scale = own * tl.load(nested_absmax + block // NESTED, mask=inside, other=0.0)
        scale = scale + tl.load(offset)
    high = tl.load(code + (both >> 4)) * scale
    low = tl.load(code + (both & 15)) * scale
    element = tl.program_id(0).to(tl.int64) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    tl.store(out + element, tl.interleave(high, low).to(out.dtype.element_ty), mask=element < elements)
