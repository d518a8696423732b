"""multi_lora against PEFT's mixed batch over the same stored adapters, on a base layer that costs nothing: inference, and
forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from essa_kernels import multi_lora

from .compare import compare, timed
from .mixed_batch import mixed_batch

ADAPTERS, RANK = 64, 16
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@pytest.mark.parametrize("stored", ["stack", "sequence"])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(("d_in", "d_out"), [(896, 896), (896, 4864), (4864, 896)])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("backward", [False, True], ids=["inference", "backward"])
def test_against_peft_mixed_batch(benchmark, record, dtype, d_in, d_out, rows, stored, backward):
    """Sequences of so many rows, each with an adapter of its own, shuffled; backward to them and to all factors."""
    with torch.inference_mode(not backward), torch.set_grad_enabled(backward):
        names, model = mixed_batch(ADAPTERS, d_in, d_out, RANK, dtype)
        layer = model.requires_grad_(backward).base_model.model[0]
        a, b = ([factors[name].weight for name in names] for factors in (layer.lora_A, layer.lora_B))
        x, ids = torch.randn(ADAPTERS, rows, d_in, dtype=dtype, requires_grad=backward), torch.randperm(ADAPTERS)
        own_names = [names[k] for k in ids]
        theirs = work(lambda: model(x, adapter_names=own_names), [x, *a, *b])
        if stored == "stack":
            a, b = (torch.stack(factors).detach().requires_grad_(backward) for factors in (a, b))
        leaves = [x, a, b] if stored == "stack" else [x, *a, *b]
        ours = work(lambda: multi_lora(x, a, b, ids, y=layer.base_layer(x)), leaves)
        for mine, other in zip(ours(), theirs(), strict=True):
            mine, other = (torch.cat([part.flatten() for part in parts]) for parts in (mine, other))
            assert_close(mine, other, rtol=0.05, atol=0.05 * other.abs().max().item())
        benchmark(ours)
        what = f"multi_lora{' with backward' * backward}, {ADAPTERS} adapters x {rows} rows, {d_in} -> {d_out}, "
        what += f"{NAMES[dtype]} r={RANK}, {stored}"
        record(compare(what, timed(ours, 5), "PEFT mixed batch", timed(theirs), rounds=15))


def work(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], tuple[tuple[Tensor, ...], ...]]:
    """The output; and where gradients are asked for, those of x and of the factors."""

    def step() -> tuple[tuple[Tensor, ...], ...]:
        y = forward()
        if not y.requires_grad:
            return ((y,),)
        d_x, *d_factors = torch.autograd.grad(y, leaves, torch.ones_like(y))
        return (y,), (d_x,), d_factors

    return step
