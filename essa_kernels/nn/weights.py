"""The weights of a model as a search moves them: a float32 point, and what the search started from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter_folder import write_folder
from .parametrization import point_of


class Weights:
    """Weights of a model that follow a float32 point.

    The point of a float32 weight may be the weight itself. Otherwise a step too small for the weight's dtype would be
    lost, so the point is a copy, and the weight is the point rounded. What the weights were at first is kept on the CPU,
    in their own dtype, for `reset`.

    Args:
        model: the model they belong to, for `save`.
        weights: the weights.
        shared: whether float32 weights are their own point. False where the weights are to be changed in between.
    """

    output = "model"

    def __init__(self, model: Any, weights: Sequence[Tensor], *, shared: bool) -> None:
        self._model = model
        self._weights = [weight.detach() for weight in weights]
        self._start = [weight.to("cpu", copy=True) for weight in self._weights]
        self.parameters = [
            weight if shared and weight.dtype is torch.float32 and weight.is_contiguous() else point_of(weight)
            for weight in self._weights
        ]

    def moved(self) -> None:
        """Let the model's weights follow their point."""
        for weight, parameter in zip(self._weights, self.parameters, strict=True):
            if parameter is not weight:
                weight.copy_(parameter)

    def reset(self) -> None:
        """Back to the weights as they were when this object was made."""
        for parameter, start in zip(self.parameters, self._start, strict=True):
            parameter.copy_(start)
        self.moved()

    def load_(self) -> None:
        """The model computes what the point does already."""

    def save(self, output_dir: str | Path, tokenizer: Any = None) -> None:
        """Write the model as a folder that transformers loads (safetensors), with its tokenizer if there is one.

        The folder appears whole or not at all; where one is there already, the new one takes its place.

        Raises:
            FileExistsError: output_dir is a file.
        """

        def fill(folder: Path) -> None:
            self._model.save_pretrained(str(folder), safe_serialization=True)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))

        write_folder(Path(output_dir), fill)
