"""Evolution strategies on a LoRA's two factors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import NoiseKey, es_update_, lora_perturbed, lora_perturbed_linear
from .adapter_folder import write_adapter_folder
from .fused import fused_base
from .lora_layers import check_active, find_lora_layers
from .parametrization import Perturbed, member_ids, point_of
from .population import Attaching, Forward, Population


class LoRAFactors(Attaching):
    """Both factors of every LoRA layer, each member's with noise of its own, drawn inside `lora_perturbed`.

    The point is kept in float32, so that steps too small for the adapter's dtype add up. Noise and updates are made
    from a key alone: nothing is held that grows with the population.

    Args:
        model: a PeftModel, or a transformers model with an injected LoRA. Its base layers may be quantised.
        adapter_name: the adapter to search; it must be the only active one.
        distribution: of the noise, "gaussian" or "rademacher".

    Attributes:
        names: sorted names of the adapted layers in the base model.
        parameters: the layers' A [r, d_in], then their B^T [r, d_out]; layer i's draw from sites 2i and 2i + 1.

    Raises:
        ValueError: there is no such LoRA adapter, or it is one that two factors alone do not describe, as for
            `SVDLoRA.from_peft`. An untrained LoRA, whose B is zero, can be searched.
    """

    name, batched, output = "lora", True, "adapter"

    def __init__(self, model: nn.Module, adapter_name: str = "default", *, distribution: str = "gaussian") -> None:
        self._model, self._adapter_name, self._distribution = model, adapter_name, distribution
        self._layers = find_lora_layers(model, adapter_name)
        self.names = [name for name, _ in self._layers]
        self.parameters = [point_of(weight) for weight in self._factors()]
        self._start = [parameter.to("cpu", copy=True) for parameter in self.parameters]

    @contextlib.contextmanager
    def attach(self, members: Perturbed) -> Iterator[Population]:
        """Let the model compute these members; on leaving, it is exactly what it was.

        Every adapted layer becomes its base layer, called as it is (or for few rows on a GPU fused with what follows, which
        rounds once where the two round twice), plus the rows' own LoRA delta. The base layer's
        output is changed in place. There is no backward, and LoRA dropout is not applied.

        Yields:
            The population; call its ``assign`` before the first forward.

        Raises:
            ValueError: the adapter is no longer the active one.
            RuntimeError: a population is attached already, or another tool has replaced a layer's forward.
        """
        for name, module in self._layers:
            check_active(name, module, self._adapter_name)
        population = Population(len(members))
        forwards = [
            (name, module, self._forward(position, module, members, population))
            for position, (name, module) in enumerate(self._layers)
        ]
        with self._replaced(population, forwards):
            yield population

    def add_noise_(self, tensors: Sequence[Tensor], key: NoiseKey, weights: Sequence[float]) -> None:
        """As in `Parametrization`."""
        half = len(self._layers)
        es_update_(tensors[:half], key, weights, distribution=self._distribution)
        es_update_(tensors[half:], key.at(site=key.site + 1), weights, distribution=self._distribution)

    def moved(self) -> None:
        """Nothing depends on the parameters but what is attached next."""

    def reset(self) -> None:
        """Back to the adapter's factors as they were when this object was made."""
        for parameter, start in zip(self.parameters, self._start, strict=True):
            parameter.copy_(start)

    @torch.no_grad()
    def load_(self) -> None:
        """Write the point into the model's own adapter, rounded to its dtype."""
        for weight, parameter in zip(self._factors(), self.parameters, strict=True):
            weight.copy_(parameter)

    def save(self, output_dir: str | Path, tokenizer: Any = None) -> None:
        """Write the point as an ordinary PEFT adapter folder: as `SVDLoRA.save_adapter`."""
        names = [f"{name}.{part}.weight" for part in ("lora_A", "lora_B") for name in self.names]
        state = {
            f"base_model.model.{name}": (parameter.mT if "lora_B" in name else parameter)
            .to("cpu", weight.dtype)
            .contiguous()
            for name, parameter, weight in zip(names, self.parameters, self._factors(), strict=True)
        }
        write_adapter_folder(self._model, self._adapter_name, state, Path(output_dir))

    def _factors(self) -> list[Tensor]:
        """The adapter's own A and B^T, as the parameters are ordered."""
        modules = [module for _, module in self._layers]
        return [module.lora_A[self._adapter_name].weight for module in modules] + [
            module.lora_B[self._adapter_name].weight.mT for module in modules
        ]

    def _forward(self, position: int, module: Any, members: Perturbed, population: Population) -> Forward:
        a, b = self.parameters[position], self.parameters[len(self._layers) + position].mT
        ids, base_layer, offsets_for = member_ids(members, a.device), module.base_layer, population.offsets_for
        key = members.key.at(site=members.key.site + 2 * position)
        options = {"scaling": module.scaling[self._adapter_name], "distribution": self._distribution}

        def fused(x: Tensor) -> Tensor:
            noise = (key, members.sigma, ids, offsets_for(x))
            return lora_perturbed_linear(x, base_layer.weight, a, b, *noise, base_layer.bias, **options)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = base_layer(x, *args, **kwargs)
            noise = (key, members.sigma, ids, offsets_for(x))
            if y.dtype is x.dtype:
                return lora_perturbed(x, a, b, *noise, y=y, **options)
            return y.add_(lora_perturbed(x, a, b, *noise, **options))

        return fused_base(base_layer, forward, lambda: fused)
