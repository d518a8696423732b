"""LoRA with factors perturbed per member in torch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from . import noise
from .products import linear, product


def lora_perturbed_(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    seed: int,
    generation: int,
    site: int,
    sigma: float,
    members: Tensor,
    offsets: Tensor,
    scaling: float,
    distribution: str,
) -> None:
    """y += scaling (B + sigma eps_B) ((A + sigma eps_A) x), row by row, with the noise of the member that owns the row."""
    draw = getattr(noise, distribution)
    eps_a = torch.empty(a.shape, dtype=torch.float32, device=x.device)
    eps_b = torch.empty(b.shape[::-1], dtype=torch.float32, device=x.device)
    for member, (first, last) in zip(members.tolist(), itertools.pairwise(offsets.tolist()), strict=True):
        if first == last:
            continue
        draw(eps_a, seed, generation, site, member)
        draw(eps_b, seed, generation, site + 1, member)
        h = product(x[first:last], (a.float() + sigma * eps_a).T)
        delta = product(scaling * h, b.float().T + sigma * eps_b)
        y[first:last] = y[first:last].float() + delta


def lora_perturbed_linear(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    seed: int,
    generation: int,
    site: int,
    sigma: float,
    members: Tensor,
    offsets: Tensor,
    scaling: float,
    distribution: str,
) -> None:
    """y = x weight^T + bias + scaling (B + sigma eps_B) ((A + sigma eps_A) x), row by row."""
    sums = linear(x, weight, bias)
    lora_perturbed_(sums, x, a, b, seed, generation, site, sigma, members, offsets, scaling, distribution)
    y.copy_(sums)
