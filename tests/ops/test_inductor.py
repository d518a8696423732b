"""Every op in whole graphs that inductor compiles for the CPU: what `torch.compile` does unless told otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from essa_kernels import (
    NoiseKey,
    decode_attention,
    dispatch,
    es_update_,
    gaussian,
    linear_logprob,
    lora_perturbed,
    lora_perturbed_linear,
    lowrank_perturbed,
    lowrank_perturbed_linear,
    lowrank_update_,
    multi_lora,
    perturb_,
    rademacher,
    svd_lora,
    svd_lora_expand_,
    svd_lora_expand_linear,
    svd_lora_linear,
    svd_lora_shrink,
)

KEY, SIGMA = NoiseKey(5, generation=1, site=2), 0.3
Graph = Callable[..., Tensor]


def random_operands(rows: int) -> dict[str, Tensor]:
    """Of three members or adapters of rank 4, and of as many sequences as rows; d_in 16, d_out 12."""
    return {
        "x": torch.randn(rows, 16),
        "weight": torch.randn(12, 16),
        "members": torch.tensor([4, 5, 9]),
        "offsets": torch.tensor([0, 2, 3, rows]),
        "a": torch.randn(3, 4, 16),
        "b": torch.randn(3, 12, 4),
        "core": torch.randn(4, 4),
        "s": torch.randn(3, 4),
        "ids": torch.arange(rows) % 4 - 1,
        "key": torch.randn(rows, 2, 9, 8),
        "value": torch.randn(rows, 2, 9, 8),
    }


def noise(x, **_) -> Tensor:
    return x.tanh() + gaussian(tuple(x.shape), KEY, 3) * rademacher(tuple(x.shape), KEY, 4)


def updates(x, weight, core, **_) -> Tensor:
    perturb_([weight, core], KEY, 3, SIGMA)
    y = x @ weight.T
    es_update_([weight, core], KEY, torch.tensor([0.5, 0.25, -1.0]))
    lowrank_update_(weight, KEY, [0.5, 0.25], rank=2)
    return y.relu() + x @ weight.T + core.sum()


def updates_of_views(x, weight, a, **_) -> Tensor:
    perturb_([weight[3:], a[1]], KEY, 3, SIGMA)
    es_update_(a[2, 1:], KEY, torch.tensor([0.5, 0.25, -1.0]))
    lowrank_update_(a[2], KEY, [0.5, 0.25])
    return x @ weight.T + a.sum()


def singular_values(x, weight, offsets, a, b, core, s, **_) -> Tensor:
    y = x @ weight.T
    svd_lora(x, a[0], core, b[0], s, s, offsets, y)
    h = svd_lora_shrink(x.tanh(), a[1], core, s, s, offsets)
    svd_lora_expand_(y, h * 2, b[1])
    together = svd_lora_linear(x, weight, a[2], core, b[2], s, s, offsets)
    return y.relu() + together * svd_lora_expand_linear(x, weight, h, b[2])


def perturbed_factors(x, weight, members, offsets, a, b, **_) -> Tensor:
    y, perturbed = x @ weight.T, (a[1], b[1], KEY, SIGMA, members, offsets)
    lora_perturbed(x, *perturbed, y=y)
    alone = lora_perturbed(x.tanh(), *perturbed, distribution="rademacher")
    return y.relu() + alone * lora_perturbed_linear(x, weight, *perturbed)


def low_rank_noise(x, weight, members, offsets, **_) -> Tensor:
    y, of_members = x @ weight.T, (KEY, SIGMA, members, offsets)
    lowrank_perturbed(x, 12, *of_members, y=y)
    alone = lowrank_perturbed(x.tanh(), 12, *of_members, rank=2, distribution="rademacher")
    return y.relu() + alone * lowrank_perturbed_linear(x, weight, *of_members)


def stored_adapters(x, weight, a, b, ids, **_) -> Tensor:
    y = x @ weight.T
    multi_lora(x, a, b, ids, scaling=2.0, y=y)
    return y.relu() + multi_lora(x.tanh(), a.unbind(), b.unbind(), ids)


def attention(x, key, value, **_) -> Tensor:
    return decode_attention(x.tanh().view(-1, 2, 8), key, value) + 1


def log_probabilities(x, weight, ids, **_) -> Tensor:
    return linear_logprob(x.tanh(), weight, ids + 1, softcap=3.0).square()


def name_of(value: Graph | bool) -> str | None:
    return getattr(value, "__name__", None)


GRAPHS = [
    noise,
    updates,
    singular_values,
    perturbed_factors,
    low_rank_noise,
    stored_adapters,
    attention,
    log_probabilities,
]
CASES = [
    *itertools.product(GRAPHS, [False, True]),
    (updates_of_views, False),  # with dynamic shapes inductor forgets where a view starts: pytorch/pytorch issue 198068
]


def test_every_op_is_in_a_graph():
    ops = {op for op in dispatch.OPS if not op.endswith("_backward")}
    assert ops <= {name for graph in GRAPHS for name in graph.__code__.co_names}


@pytest.mark.slow
@pytest.mark.parametrize(("graph", "dynamic"), CASES, ids=name_of)
def test_values(graph, dynamic, seed):
    """Of what a graph returns, and bit for bit of what it changes in place."""
    compiled = torch.compile(graph, fullgraph=True, backend="inductor", dynamic=dynamic)
    for rows in (5, 9):
        operands = random_operands(rows)
        others = {name: operand.clone() for name, operand in operands.items()}
        with torch.no_grad():
            assert_close(compiled(**operands), graph(**others))
        for name, operand in operands.items():
            assert torch.equal(operand, others[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("graph", [stored_adapters, log_probabilities], ids=name_of)
def test_gradients(graph, dynamic, seed):
    compiled = torch.compile(graph, fullgraph=True, backend="inductor", dynamic=dynamic)
    for rows in (5, 9):
        operands = random_operands(rows)
        leaves = [operand.requires_grad_() for operand in operands.values() if operand.is_floating_point()]
        got, expected = (
            torch.autograd.grad(op(**operands).square().sum(), leaves, allow_unused=True) for op in (compiled, graph)
        )
        assert_close(got, expected)
