"""What every parametrisation offers: parameters that a search moves, and a population of perturbations around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import NoiseKey
from .population import Population


@dataclasses.dataclass(frozen=True)
class Perturbed:
    """Members of a population, each the parametrisation's point plus its own noise: a key stands for them all.

    A slice of it is some of the members.

    Attributes:
        key: seed and generation of the noise; its site is the first of the parametrisation's.
        sigma: the scale of the noise. At 0 every member is the point itself.
        members: who they are. Members 2k and 2k + 1 have the same noise with opposite signs.
    """

    key: NoiseKey
    sigma: float
    members: range

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, part: slice) -> Perturbed:
        return dataclasses.replace(self, members=self.members[part])


POINT = Perturbed(NoiseKey(0), 0.0, range(1))
"""The point itself, as a population of one."""


class Parametrization(Protocol):
    """Something in a model that a search can move.

    Attributes:
        name: what the command line calls it.
        parameters: the point, float32, each tensor of the shape of its noise matrix. A search changes them in place and
            then calls ``moved``.
        batched: whether one batch may hold rows of several members; if not, ``attach`` takes one member at a time.
        output: the name of the folder that ``save`` writes: "adapter" for what needs a model with a LoRA adapter; for all
            else, such as "model", the model comes without, or has it merged into its weights.
    """

    name: str
    parameters: list[Tensor]
    batched: bool
    output: str

    def attach(self, members: Perturbed) -> AbstractContextManager[Population]:
        """Let the model compute these members; on leaving, the model is exactly what it was."""
        ...

    def add_noise_(self, tensors: Sequence[Tensor], key: NoiseKey, weights: Sequence[float]) -> None:
        """``tensors[i] += sum_n weights[n] eps_n`` for tensors shaped like the parameters, with the noise that members
        0, 1, ... of ``attach`` have on parameter i; it is never stored."""
        ...

    def moved(self) -> None:
        """To be called when the parameters have changed."""
        ...

    def reset(self) -> None:
        """Take the parameters back to where they were when this object was made."""
        ...

    def load_(self) -> None:
        """Make the model itself compute what the point does."""
        ...

    def save(self, output_dir: str | Path, tokenizer: Any = None) -> None:
        """Write the point as a folder that PEFT or transformers load; it appears whole or not at all."""
        ...


def member_ids(members: Perturbed, device: torch.device) -> Tensor:
    """The members as the ops take them."""
    return torch.tensor(list(members.members), dtype=torch.int64, device=device)


def point_of(weight: Tensor) -> Tensor:
    """A contiguous float32 copy of a weight, for a search to move."""
    return torch.empty(weight.shape, dtype=torch.float32, device=weight.device).copy_(weight.detach())
