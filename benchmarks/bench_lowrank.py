"""EGGROLL's low-rank noise: what it leaves of a model's speed, and its update against torch's.

The forward is measured over a whole model against the same model without noise, pure inference; the update against
factors drawn with `normal_` for all members and multiplied by one `addmm`, and against the members one by one.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from essa_kernels import NoiseKey, lowrank_perturbed, lowrank_update_

from .compare import compare, timed
from .shapes import qwen_shaped

MEMBERS, SIGMA = 64, 0.01
KEY = NoiseKey(seed=1)


def perturb(model: nn.Module, distribution: str, members: torch.Tensor, offsets: torch.Tensor) -> list:
    """Let every linear layer add its noise; the handles take that back."""

    def add_noise(key, module, inputs, y):
        lowrank_perturbed(inputs[0], y.shape[-1], key, SIGMA, members, offsets, distribution=distribution, y=y)

    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    keys = [KEY.at(site=2 * i) for i in range(len(linears))]
    return [
        linear.register_forward_hook(functools.partial(add_noise, key))
        for linear, key in zip(linears, keys, strict=True)
    ]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_share_of_pure_inference(benchmark, record, distribution, rows):
    """64 members of rank 1, each with so many rows: tokens of one sequence."""
    model = qwen_shaped(torch.bfloat16)
    tokens = torch.randint(0, 1024, (MEMBERS, rows))
    pure = timed(lambda: model(input_ids=tokens, use_cache=False))
    members, offsets = torch.arange(MEMBERS), torch.arange(MEMBERS + 1) * rows

    def perturbed() -> float:
        handles = perturb(model, distribution, members, offsets)
        seconds = pure()
        for handle in handles:
            handle.remove()
        return seconds

    benchmark.pedantic(perturbed, rounds=1)
    what = f"0.5B-shaped model, {distribution} rank 1, {MEMBERS} members x {rows} rows, bf16"
    record(compare(what, perturbed, "pure inference", pure, rounds=15, as_share=True))


@pytest.mark.parametrize("members", [64, 512])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_update(benchmark, record, distribution, members, d_out=4864, d_in=896):
    w, weights = torch.randn(d_out, d_in), torch.randn(members)

    def ours():
        lowrank_update_(w, KEY, weights, distribution=distribution)

    def with_torch():
        """Needs room for the factors of all members."""
        pair_weights = weights[0::2] - weights[1::2]
        e, f = (torch.empty(members // 2, d) for d in (d_out, d_in))
        for factor in (e, f):
            factor.normal_() if distribution == "gaussian" else factor.bernoulli_(0.5).mul_(2).sub_(1)
        w.addmm_(e.T, pair_weights[:, None] * f)

    benchmark.pedantic(ours, rounds=1)
    what = f"lowrank_update_, {distribution} rank 1, {members} members, {d_out}x{d_in} fp32"
    record(compare(what, timed(ours), "factors of all + addmm", timed(with_torch), rounds=9))
