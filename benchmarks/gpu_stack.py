"""A population over the linear layers of a 7B-shaped model, against the same layers without any adapter.

Four decoder layers with random weights (202 million each, so none is found in a cache), norms and activations between
them, and no attention: adapters cost the same with it, so their share of a real model's time is smaller than here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import essa_kernels

from .gpu_problems import DTYPE, MEMBERS, Adapter

LAYERS, HIDDEN, MLP, RANK = 4, 4096, 11008, 16

# Projections of one layer; those of one line are given the same tensor.
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


@dataclass(frozen=True)
class Projection:
    """One linear layer with its adapter."""

    weight: Tensor
    v_a: Tensor
    core: Tensor
    u_b: Tensor


@dataclass(frozen=True)
class Group:
    """Projections of one tensor with every member's singular values, each alone and all together."""

    projections: list[Projection]
    values: list[tuple[Tensor, Tensor]]
    stacked_v_a: Tensor
    block_core: Tensor
    joined_values: tuple[Tensor, Tensor]


Method = Callable[[Group, Tensor, Tensor], list[Tensor]]
"""(group, x, offsets) -> what the group's projections make of x."""


def pure(group: Group, x: Tensor, offsets: Tensor) -> list[Tensor]:
    return [F.linear(x, p.weight) for p in group.projections]


def with_svd_lora(group: Group, x: Tensor, offsets: Tensor) -> list[Tensor]:
    outputs = pure(group, x, offsets)
    for p, (s_a, s_b), y in zip(group.projections, group.values, outputs, strict=True):
        essa_kernels.svd_lora(x, p.v_a, p.core, p.u_b, s_a, s_b, offsets, y)
    return outputs


def with_shared_shrink(group: Group, x: Tensor, offsets: Tensor) -> list[Tensor]:
    outputs = pure(group, x, offsets)
    h = essa_kernels.svd_lora_shrink(x, group.stacked_v_a, group.block_core, *group.joined_values, offsets)
    for p, y, columns in zip(group.projections, outputs, h.split(RANK, 1), strict=True):
        essa_kernels.svd_lora_expand_(y, columns, p.u_b)
    return outputs


def with_svd_lora_linear(group: Group, x: Tensor, offsets: Tensor) -> list[Tensor]:
    return [
        essa_kernels.svd_lora_linear(x, p.weight, p.v_a, p.core, p.u_b, s_a, s_b, offsets)
        for p, (s_a, s_b) in zip(group.projections, group.values, strict=True)
    ]


METHODS: dict[str, Method] = {
    "svd_lora after each layer": with_svd_lora,
    "svd_lora_shrink once for q, k, v and for gate, up": with_shared_shrink,
    "svd_lora_linear in place of each layer": with_svd_lora_linear,
}


class Stack:
    """The layers on a device. ``shrink`` divides their widths."""

    def __init__(self, device: str, shrink: int = 1) -> None:
        hidden, mlp = HIDDEN // shrink, MLP // shrink
        sizes = dict.fromkeys(("q", "k", "v", "o"), (hidden, hidden))
        sizes |= {"gate": (hidden, mlp), "up": (hidden, mlp), "down": (mlp, hidden)}
        self.hidden = hidden
        self.layers = [[make_group([sizes[name] for name in names], device) for names in GROUPS] for _ in range(LAYERS)]

    def forward(self, x: Tensor, offsets: Tensor, method: Method) -> Tensor:
        for attention, output, mlp_in, mlp_out in self.layers:
            q, k, v = method(attention, F.rms_norm(x, (self.hidden,)), offsets)
            x = x + method(output, q + k + v, offsets)[0]
            gate, up = method(mlp_in, F.rms_norm(x, (self.hidden,)), offsets)
            x = x + method(mlp_out, F.silu(gate) * up, offsets)[0]
        return x


def make_group(sizes: list[tuple[int, int]], device: str) -> Group:
    projections, values = [], []
    for d_in, d_out in sizes:
        adapter = Adapter(MEMBERS, d_in, d_out, RANK)
        weight = torch.randn(d_out, d_in, device=device, dtype=DTYPE) / d_in**0.5
        projections.append(Projection(weight, *adapter.factors(device)))
        values.append(adapter.values(device))
    stacked = torch.cat([p.v_a for p in projections])
    core = torch.block_diag(*(p.core for p in projections))
    s_a, s_b = (torch.cat(parts, 1) for parts in zip(*values, strict=True))
    return Group(projections, values, stacked, core, (s_a, s_b))
