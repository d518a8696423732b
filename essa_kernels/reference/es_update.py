"""Full-rank noise on parameters in torch, bit for bit: a member's perturbation, and the update of all members."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import noise


def perturb_(
    tensors: Sequence[Tensor], seed: int, generation: int, site: int, member: int, sigma: float, distribution: str
) -> None:
    """tensor i = round(fma(+-sigma, eps, tensor i)), with the eps of site + 2 i and of the pair's even member."""
    signed_sigma = float(torch.tensor(-sigma if member & 1 else sigma, dtype=torch.float32))
    for i, tensor in enumerate(tensors):
        eps = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
        getattr(noise, distribution)(eps, seed, generation, site + 2 * i, member & ~1)
        tensor.copy_(noise.fma(eps, signed_sigma, tensor.float()))


def es_update_(
    tensors: Sequence[Tensor], seed: int, generation: int, site: int, pair_weights: Tensor, distribution: str
) -> None:
    """tensor i += sum over pairs of pair_weights[pair] eps, with eps drawn from site + 2 i; the order is the contract."""
    for i, tensor in enumerate(tensors):
        eps = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
        total = torch.zeros_like(eps)
        for pair, weight in enumerate(pair_weights.tolist()):
            if weight != 0:
                getattr(noise, distribution)(eps, seed, generation, site + 2 * i, 2 * pair)
                total = noise.fma(eps, weight, total)
        tensor.copy_(tensor.float() + total)
