"""decode_attention against what transformers calls for one token a row, torch's SDPA over grouped heads with a mask; and
decoding with it and with caches that grow in place against decoding as transformers does.

Every layer of a model has keys and values of its own, so that they come from memory, as they do while decoding.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from essa.attention import kernel_attention
from essa.kv_cache import grow_in_place
from torch.testing import assert_close
from transformers import DynamicCache, Qwen2Model

from essa_kernels import decode_attention

from .compare import compare, timed
from .shapes import qwen_shaped

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


def cache_of(model: Qwen2Model, rows: int, length: int) -> DynamicCache:
    config, cache = model.config, DynamicCache(config=model.config)
    d = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, rows, config.num_key_value_heads, length, d, dtype=model.dtype), layer)
    return cache


def decoding(model: Qwen2Model, cache: DynamicCache, rows: int) -> Callable[[], torch.Tensor]:
    """A call decodes one more token of every row, whose prompts are padded on the left."""
    token = torch.zeros(rows, 1, dtype=torch.int64)

    def step() -> torch.Tensor:
        length = cache.get_seq_length() + 1
        mask = (torch.arange(length) >= torch.arange(rows)[:, None] % 32).long()
        positions = torch.full((rows, 1), length - 1)
        output = model(input_ids=token, attention_mask=mask, position_ids=positions, past_key_values=cache)
        return output.last_hidden_state

    return step


@pytest.mark.parametrize("length", [64, 512, 2048])
def test_a_step_against_transformers(benchmark, record, length):
    """The body of Qwen2.5-0.5B, 64 rows, bfloat16."""
    rows, model = 64, qwen_shaped(torch.bfloat16)
    caches = [cache_of(model, rows, length) for _ in range(2)]
    grow_in_place(caches[0], 2 * length)
    with_kernel, theirs = (decoding(model, cache, rows) for cache in caches)

    def ours() -> torch.Tensor:
        with kernel_attention(model):
            return with_kernel()

    benchmark.pedantic(ours, rounds=3)
    what = f"a step of decoding, 0.5B-shaped body, bf16, {rows} rows x {length} positions"
    record(compare(what, timed(ours), "transformers' cache and SDPA", timed(theirs), rounds=9))
