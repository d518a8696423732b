"""decode_attention against what transformers calls for one token a row, torch's SDPA over grouped heads with a mask.

Every layer of a model has keys and values of its own, so that they come from memory, as they do while decoding.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from essa_kernels import decode_attention

from .compare import compare, timed

LAYERS = 8
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# rows, heads, kv_heads, d
MODELS = {"Qwen2.5-0.5B": (64, 14, 2, 64), "Llama 3 8B": (32, 32, 8, 128), "a head each": (16, 8, 8, 64)}


@pytest.mark.parametrize("length", [64, 512, 2048])
@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_against_sdpa(benchmark, record, dtype, shape, length):
    rows, heads, kv_heads, d = MODELS[shape]
    query = torch.randn(rows, heads, d, dtype=dtype)
    keys, values = torch.randn(2, LAYERS, rows, kv_heads, length, d, dtype=dtype)
    mask = torch.arange(length) >= torch.arange(rows)[:, None] % 32  # padding on the left

    def ours() -> list[torch.Tensor]:
        return [decode_attention(query, key, value, mask) for key, value in zip(keys, values, strict=True)]

    grouped, seen = query.view(rows, kv_heads, heads // kv_heads, d), mask[:, None, None]

    def theirs() -> list[torch.Tensor]:
        pairs = zip(keys, values, strict=True)
        return [F.scaled_dot_product_attention(grouped, key, value, attn_mask=seen) for key, value in pairs]

    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    assert_close(ours()[-1], theirs()[-1].view(rows, heads, d), rtol=tolerance, atol=tolerance)
    benchmark(ours)
    what = f"decode_attention, {NAMES[dtype]}, {rows} rows x {length} positions, heads of {shape}"
    record(compare(what, timed(ours), "SDPA", timed(theirs), rounds=15))
