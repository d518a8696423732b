"""LoRA with factors perturbed per member in Triton."""

from __future__ import annotations

from torch import Tensor

from .perturbed import add_perturbed, noise_of
from .perturbed_linear import perturbed_linear


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
    noise = noise_of(seed, generation, site, a.shape[0], distribution, perturbed=True)
    add_perturbed(y, x, a, b, sigma, members, offsets, scaling, noise)


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
    noise = noise_of(seed, generation, site, a.shape[0], distribution, perturbed=True)
    perturbed_linear(y, x, weight, bias, a, b, sigma, members, offsets, scaling, noise)
