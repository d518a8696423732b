"""multi_lora against PEFT's mixed-batch inference over the same stored adapters, on a base layer that costs nothing."""

from __future__ import annotations

import pytest
import torch
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
def test_against_peft_mixed_batch(benchmark, record, dtype, d_in, d_out, rows, stored):
    """Sequences of so many rows, each with an adapter of its own, shuffled."""
    names, model = mixed_batch(ADAPTERS, d_in, d_out, RANK, dtype)
    layer = model.base_model.model[0]
    a, b = ([factors[name].weight.detach() for name in names] for factors in (layer.lora_A, layer.lora_B))
    if stored == "stack":
        a, b = torch.stack(a), torch.stack(b)
    x, ids = torch.randn(ADAPTERS, rows, d_in, dtype=dtype), torch.randperm(ADAPTERS)
    own_names = [names[k] for k in ids]

    def ours() -> torch.Tensor:
        return multi_lora(x, a, b, ids, y=layer.base_layer(x))

    def theirs() -> torch.Tensor:
        return model(x, adapter_names=own_names)

    assert_close(ours(), theirs(), rtol=0.05, atol=0.05 * theirs().abs().max().item())
    benchmark(ours)
    what = f"multi_lora, {ADAPTERS} adapters x {rows} rows, {d_in} -> {d_out}, {NAMES[dtype]} r={RANK}, {stored}"
    record(compare(what, timed(ours, 5), "PEFT mixed batch", timed(theirs), rounds=15))
