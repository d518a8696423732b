"""EGGROLL's low-rank noise in torch: the forward, and the update bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import noise
from .products import linear, product


def lowrank_perturbed_(
    y: Tensor,
    x: Tensor,
    seed: int,
    generation: int,
    site: int,
    sigma: float,
    members: Tensor,
    offsets: Tensor,
    rank: int,
    distribution: str,
) -> None:
    """y += sigma / sqrt(rank) E (F^T x), row by row, with the factors of the pair of the member that owns the row."""
    draw = getattr(noise, distribution)
    f_t, e_t = _factors(y.shape[1], x.shape[1], rank, x.device)
    for member, (first, last) in zip(members.tolist(), itertools.pairwise(offsets.tolist()), strict=True):
        if first == last:
            continue
        draw(f_t, seed, generation, site, member & ~1)
        draw(e_t, seed, generation, site + 1, member & ~1)
        scale = (-sigma if member & 1 else sigma) / rank**0.5
        h = product(x[first:last], f_t.T) * scale
        y[first:last] = y[first:last].float() + product(h, e_t)


def lowrank_perturbed_linear(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: int,
    generation: int,
    site: int,
    sigma: float,
    members: Tensor,
    offsets: Tensor,
    rank: int,
    distribution: str,
) -> None:
    """y = x weight^T + bias + sigma / sqrt(rank) E (F^T x), row by row."""
    sums = linear(x, weight, bias)
    lowrank_perturbed_(sums, x, seed, generation, site, sigma, members, offsets, rank, distribution)
    y.copy_(sums)


def lowrank_update_(
    tensors: Sequence[Tensor],
    seed: int,
    generation: int,
    site: int,
    pair_weights: Tensor,
    rank: int,
    distribution: str,
) -> None:
    """tensor i += sum over pairs of pair_weights[pair] E F^T, E and F drawn from site + 2 i; the order is the contract."""
    draw = getattr(noise, distribution)
    for i, tensor in enumerate(tensors):
        d_out, d_in = tensor.shape
        f_t, e_t = _factors(d_out, d_in, rank, tensor.device)
        total = torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
        for pair, weight in enumerate(pair_weights.tolist()):
            if weight == 0:
                continue
            draw(f_t, seed, generation, site + 2 * i, 2 * pair)
            draw(e_t, seed, generation, site + 2 * i + 1, 2 * pair)
            for f, e in zip(f_t, weight * e_t, strict=True):
                total = noise.fma(e[:, None], f, total)
        tensor.copy_(tensor.float() + total)


def _factors(d_out: int, d_in: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for F^T [rank, d_in] and E^T [rank, d_out]."""
    f_t = torch.empty(rank, d_in, dtype=torch.float32, device=device)
    return f_t, torch.empty(rank, d_out, dtype=torch.float32, device=device)
