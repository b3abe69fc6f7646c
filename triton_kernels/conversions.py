"""Conversions between storage types and the types of the arithmetic, for every Triton kernel.

bfloat16 by its bits: the interpreter's own conversion drops the lower half instead of rounding, and
loses subnormal numbers.
"""

import triton
import triton.language as tl


@triton.jit
def widen(x, dtype: tl.constexpr):
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
        return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
