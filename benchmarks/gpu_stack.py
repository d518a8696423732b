"""A population over the linear layers of a 7B-shaped model, against the same layers without any adapter.

Four decoder layers with random weights (202 million each, so none is found in a cache), norms and activations between
them, and no attention: adapters cost the same with it, so their share of a real model's time is smaller than here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

import essa_kernels
from essa_kernels import NoiseKey

from .gpu_problems import DISTRIBUTIONS, KEY, MEMBERS, Adapter

LAYERS, HIDDEN, MLP = 4, 4096, 11008
RANK, PERTURBED_RANK = 16, 8
SIGMA = 1e-2

# Projections of one layer; those of one line are given the same tensor.
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


@dataclass(frozen=True)
class Projection:
    """One linear layer with an adapter for `svd_lora`, and a LoRA and a key of its own for members that perturb it."""

    weight: Tensor
    v_a: Tensor
    core: Tensor
    u_b: Tensor
    a: Tensor
    b: Tensor
    key: NoiseKey


@dataclass(frozen=True)
class Group:
    """Projections of one tensor, the members, and every member's singular values, each alone and all together."""

    projections: list[Projection]
    members: Tensor
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


def shared_shrink(group: Group, x: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """Each projection's h."""
    h = essa_kernels.svd_lora_shrink(x, group.stacked_v_a, group.block_core, *group.joined_values, offsets)
    return h.split(RANK, 1)


def with_shared_shrink(group: Group, x: Tensor, offsets: Tensor) -> list[Tensor]:
    outputs = pure(group, x, offsets)
    for p, y, h in zip(group.projections, outputs, shared_shrink(group, x, offsets), strict=True):
        essa_kernels.svd_lora_expand_(y, h, p.u_b)
    return outputs


def with_expand_linear(group: Group, x: Tensor, offsets: Tensor) -> list[Tensor]:
    return [
        essa_kernels.svd_lora_expand_linear(x, p.weight, h, p.u_b)
        for p, h in zip(group.projections, shared_shrink(group, x, offsets), strict=True)
    ]


def with_svd_lora_linear(group: Group, x: Tensor, offsets: Tensor) -> list[Tensor]:
    return [
        essa_kernels.svd_lora_linear(x, p.weight, p.v_a, p.core, p.u_b, s_a, s_b, offsets)
        for p, (s_a, s_b) in zip(group.projections, group.values, strict=True)
    ]


def with_lora_perturbed(group: Group, x: Tensor, offsets: Tensor, distribution: str) -> list[Tensor]:
    outputs = pure(group, x, offsets)
    for p, y in zip(group.projections, outputs, strict=True):
        noise = (p.key, SIGMA, group.members, offsets)
        essa_kernels.lora_perturbed(x, p.a, p.b, *noise, distribution=distribution, y=y)
    return outputs


def with_lora_perturbed_linear(group: Group, x: Tensor, offsets: Tensor, distribution: str) -> list[Tensor]:
    noise = (SIGMA, group.members, offsets)
    return [
        essa_kernels.lora_perturbed_linear(x, p.weight, p.a, p.b, p.key, *noise, distribution=distribution)
        for p in group.projections
    ]


def with_lowrank_perturbed(group: Group, x: Tensor, offsets: Tensor, distribution: str) -> list[Tensor]:
    outputs = pure(group, x, offsets)
    for p, y in zip(group.projections, outputs, strict=True):
        noise = (p.key, SIGMA, group.members, offsets)
        essa_kernels.lowrank_perturbed(x, y.shape[1], *noise, distribution=distribution, y=y)
    return outputs


def with_lowrank_perturbed_linear(group: Group, x: Tensor, offsets: Tensor, distribution: str) -> list[Tensor]:
    noise = (SIGMA, group.members, offsets)
    return [
        essa_kernels.lowrank_perturbed_linear(x, p.weight, p.key, *noise, distribution=distribution)
        for p in group.projections
    ]


PERTURBING = {
    f"lora_perturbed, rank {PERTURBED_RANK}, after each layer": with_lora_perturbed,
    f"lora_perturbed_linear, rank {PERTURBED_RANK}, in place of each layer": with_lora_perturbed_linear,
    "lowrank_perturbed, rank 1, after each layer": with_lowrank_perturbed,
    "lowrank_perturbed_linear, rank 1, in place of each layer": with_lowrank_perturbed_linear,
}
METHODS: dict[str, Method] = {
    f"svd_lora, rank {RANK}, after each layer": with_svd_lora,
    f"svd_lora_shrink, rank {RANK}, once for q, k, v and for gate, up": with_shared_shrink,
    f"svd_lora_shrink, rank {RANK}, likewise, svd_lora_expand_linear in place of each layer": with_expand_linear,
    f"svd_lora_linear, rank {RANK}, in place of each layer": with_svd_lora_linear,
    **{f"{name}, {d}": partial(way, distribution=d) for name, way in PERTURBING.items() for d in DISTRIBUTIONS},
}


class Stack:
    """The layers on a device. ``shrink`` divides their widths."""

    def __init__(self, device: str, shrink: int = 1) -> None:
        hidden, mlp = HIDDEN // shrink, MLP // shrink
        sizes = dict.fromkeys(("q", "k", "v", "o"), (hidden, hidden))
        sizes |= {"gate": (hidden, mlp), "up": (hidden, mlp), "down": (mlp, hidden)}
        self.hidden = hidden
        keys = (KEY.at(site=site) for site in count(step=2))  # each takes a site for either factor
        self.layers = [
            [make_group([sizes[name] for name in names], keys, device) for names in GROUPS] for _ in range(LAYERS)
        ]

    def forward(self, x: Tensor, offsets: Tensor, method: Method) -> Tensor:
        for attention, output, mlp_in, mlp_out in self.layers:
            q, k, v = method(attention, F.rms_norm(x, (self.hidden,)), offsets)
            x = x + method(output, q + k + v, offsets)[0]
            gate, up = method(mlp_in, F.rms_norm(x, (self.hidden,)), offsets)
            x = x + method(mlp_out, F.silu(gate) * up, offsets)[0]
        return x


def make_group(sizes: list[tuple[int, int]], keys: Iterator[NoiseKey], device: str) -> Group:
    projections, values = [], []
    for d_in, d_out in sizes:
        adapter = Adapter(MEMBERS, d_in, d_out, RANK)
        a, _, b = Adapter(MEMBERS, d_in, d_out, PERTURBED_RANK).factors(device)
        projections.append(Projection(adapter.weight(device), *adapter.factors(device), a, b, next(keys)))
        values.append(adapter.values(device))
    stacked = torch.cat([p.v_a for p in projections])
    core = torch.block_diag(*(p.core for p in projections))
    s_a, s_b = (torch.cat(parts, 1) for parts in zip(*values, strict=True))
    return Group(projections, torch.arange(MEMBERS, device=device), values, stacked, core, (s_a, s_b))
