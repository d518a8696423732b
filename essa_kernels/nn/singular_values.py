"""ESSA's parametrisation as offsets from where the search starts: some of a LoRA's singular values move, the rest stay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import NoiseKey, es_update_, gaussian
from .parametrization import Perturbed
from .population import Population
from .svd_lora import SVDLoRA

OFFSET_MODES = ("absolute", "relative")


class SingularValues:
    """Offsets of the largest singular values of a LoRA adapter.

    The one parametrisation with so few coordinates that members may also be given one by one: ``attach`` takes offsets
    [members, size] too.

    Args:
        model, adapter_name: as for `SVDLoRA.from_peft`.
        alpha: the fraction of each factor's singular values that moves, the largest; in (0, 1].
        offset_mode: "absolute": singular value + offset; "relative": singular value x (1 + offset).

    Attributes:
        lora: the `SVDLoRA`.
        searched: [size], int64: which of its coordinates move.
        size: how many do.
        parameters: one tensor [size]: the offsets, whose noise is one row.

    Raises:
        ValueError: an argument is out of range, or as `SVDLoRA.from_peft`.

    Source: ESSA, arXiv 2507.04453.
    """

    name, batched, output = "svd", True, "adapter"

    def __init__(
        self, model: nn.Module, adapter_name: str = "default", *, alpha: float = 1.0, offset_mode: str = "absolute"
    ) -> None:
        if offset_mode not in OFFSET_MODES:
            raise ValueError(f"offset_mode must be one of {', '.join(OFFSET_MODES)}, got {offset_mode!r}")
        self.lora = SVDLoRA.from_peft(model, adapter_name)
        self.searched = self.lora.top(alpha)
        self.size = len(self.searched)
        self.parameters = [torch.zeros(self.size)]
        self._relative = offset_mode == "relative"

    def values(self, offsets: Tensor) -> Tensor:
        """All singular values at offsets [members, size]: float32 [members, lora.size]."""
        start = self.lora.spectrum[self.searched]
        values = self.lora.spectrum.repeat(len(offsets), 1)
        values[:, self.searched] = start * (1.0 + offsets) if self._relative else start + offsets
        return values

    @contextlib.contextmanager
    def attach(self, members: Perturbed | Tensor) -> Iterator[Population]:
        """As `SVDLoRA.attach`, of members around the point or at offsets [members, size] from the start."""
        offsets = self._offsets(members) if isinstance(members, Perturbed) else members
        if offsets.dim() != 2 or offsets.shape[1] != self.size or not len(offsets):
            raise ValueError(f"offsets must have shape [members, {self.size}], got {list(offsets.shape)}")
        with self.lora.attach(self.values(offsets)) as population:
            yield population

    def add_noise_(self, tensors: Sequence[Tensor], key: NoiseKey, weights: Sequence[float]) -> None:
        """As in `Parametrization`."""
        es_update_(tensors, key, weights)

    def moved(self) -> None:
        """Nothing depends on the parameters but what is asked for next."""

    def reset(self) -> None:
        """Back to the adapter's own singular values."""
        self.parameters[0].zero_()

    def load_(self) -> None:
        """Write the point into the model's own adapter; see `SVDLoRA.load_`."""
        self.lora.load_(self._point())

    def save(self, output_dir: str | Path, tokenizer: Any = None) -> None:
        """Write the point as a PEFT adapter folder; see `SVDLoRA.save_adapter`."""
        self.lora.save_adapter(self._point(), output_dir)

    def _point(self) -> Tensor:
        return self.values(self.parameters[0][None])[0]

    def _offsets(self, members: Perturbed) -> Tensor:
        (point,) = self.parameters
        if members.sigma == 0:
            return point.repeat(len(members), 1)
        noise = [gaussian(point.shape, members.key, member) for member in members.members]
        return torch.addcmul(point, torch.stack(noise), torch.tensor(members.sigma))
