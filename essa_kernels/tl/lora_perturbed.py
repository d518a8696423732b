"""LoRA with factors perturbed per member in Triton."""

from __future__ import annotations

from torch import Tensor

from .perturbed import add_perturbed


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
    add_perturbed(y, x, a, b, seed, generation, site, sigma, members, offsets, a.shape[0], scaling, distribution)
