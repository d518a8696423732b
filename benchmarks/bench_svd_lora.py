"""ESSA's population forward, measured where it runs: right after its base layer has gone through the cache.

The rivals are four torch calls that compute the same, PEFT's mixed-batch inference over one stored adapter per member,
and a whole model that carries no adapter at all: pure inference.
"""

from __future__ import annotations

import time

import peft
import pytest
import torch
import torch.nn.functional as F

from essa_kernels import svd_lora
from essa_kernels.nn import SVDLoRA

from .compare import compare, timed
from .mixed_batch import mixed_batch
from .shapes import PROJECTIONS, qwen_shaped

MEMBERS = 64
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def make_site(d_in: int, d_out: int, rank: int, dtype: torch.dtype):
    weight = torch.randn(d_out, d_in, dtype=dtype) / d_in**0.5
    v_a = torch.randn(rank, d_in, dtype=dtype) / d_in**0.5
    return weight, v_a, torch.randn(rank, rank), torch.randn(d_out, rank, dtype=dtype)


@pytest.mark.parametrize("rows", [64, 512])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_against_four_torch_calls(benchmark, record, dtype, rows, rank=8):
    """A decoder layer's seven projections in turn, each base product followed by its delta; only the delta is timed."""
    sites = [make_site(d_in, d_out, rank, dtype) for d_in, d_out in PROJECTIONS]
    inputs = {d_in: torch.randn(rows, d_in, dtype=dtype) for d_in in (896, 4864)}
    s_a, s_b = torch.rand(MEMBERS, rank) + 0.5, torch.rand(MEMBERS, rank) + 0.5
    offsets = torch.arange(0, rows + 1, rows // MEMBERS)
    # The rival is spared what it could prepare: scales already gathered per row, the core already in the dtype.
    row_a, row_b = (s.repeat_interleave(rows // MEMBERS, 0).to(dtype) for s in (s_a, s_b))
    cores = [core.to(dtype) for _, _, core, _ in sites]

    def run(delta) -> float:
        seconds = 0.0
        for i, (weight, v_a, core, u_b) in enumerate(sites):
            x = inputs[weight.shape[1]]
            y = F.linear(x, weight)
            start = time.perf_counter()
            delta(i, y, x, v_a, core, u_b)
            seconds += time.perf_counter() - start
        return seconds

    def fused(i, y, x, v_a, core, u_b):
        svd_lora(x, v_a, core, u_b, s_a, s_b, offsets, y)

    def four_calls(i, y, x, v_a, core, u_b):
        y += F.linear(F.linear(F.linear(x, v_a) * row_a, cores[i]) * row_b, u_b)

    what = f"svd_lora in situ, {NAMES[dtype]} r={rank}, {rows} rows, 7 projections"
    benchmark.pedantic(lambda: run(fused), rounds=3)
    record(compare(what, lambda: run(fused), "four torch calls", lambda: run(four_calls), rounds=25))


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_against_peft_mixed_batch(benchmark, record, dtype, d=896, rank=8):
    names, model = mixed_batch(MEMBERS, d, d, rank, dtype)
    x = torch.randn(MEMBERS, d, dtype=dtype)
    _, v_a, core, u_b = make_site(d, d, rank, dtype)
    s_a, s_b, offsets = torch.rand(MEMBERS, rank), torch.rand(MEMBERS, rank), torch.arange(MEMBERS + 1)
    y = torch.zeros(MEMBERS, d, dtype=dtype)

    def ours():
        svd_lora(x, v_a, core, u_b, s_a, s_b, offsets, y.zero_())

    benchmark(ours)
    rival = timed(lambda: model(x, adapter_names=names))
    what = f"svd_lora, {MEMBERS} members x 1 row, {d}x{d} {NAMES[dtype]} r={rank}"
    record(compare(what, timed(ours, 10), "PEFT mixed batch", rival, rounds=15))


@pytest.mark.parametrize("length", [1, 8], ids=["decode", "prefill"])
@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_share_of_pure_inference(benchmark, record, dtype, rank, length):
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False)
    with torch.inference_mode(False):
        pure = qwen_shaped(dtype)
        adapted = peft.get_peft_model(qwen_shaped(dtype), config).to(dtype).eval()
    space = SVDLoRA.from_peft(adapted)
    values = space.spectrum * (1 + 0.1 * torch.randn(MEMBERS, space.size))
    tokens = torch.randint(0, 1024, (MEMBERS, length))
    with space.attach(values) as population:
        population.assign(torch.arange(MEMBERS + 1))
        ours = timed(lambda: adapted.base_model.model(input_ids=tokens, use_cache=False))
        rival = timed(lambda: pure(input_ids=tokens, use_cache=False))
        benchmark.pedantic(ours, rounds=1)
        what = f"0.5B-shaped model, {MEMBERS} members, {MEMBERS * length} rows, {NAMES[dtype]} r={rank}"
        rounds = 15 if length == 1 else 5
        record(compare(what, ours, "pure inference", rival, rounds=rounds, as_share=True))
