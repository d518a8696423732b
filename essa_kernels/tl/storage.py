"""The dtypes tensors are stored in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(value, element: tl.constexpr):
    """A float32 value in a dtype, rounded to nearest. Triton's interpreter would cut it off instead to bfloat16."""
    if INTERPRETED and element == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        result = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(element)
    return result
