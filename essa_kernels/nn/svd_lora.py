"""ESSA's parametrisation: a member of the population is the singular values of the model's LoRA factors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_folder import write_adapter_folder
from .factors import Factors
from .lora_layers import check_active, find_lora_layers
from .population import AdaptedLayer, Attaching, Population, group


class SVDLoRA(Attaching):
    """The singular values of a LoRA adapter as the coordinates of a search. Make it with `SVDLoRA.from_peft`.

    A = U_A diag(s_A) V_A^T and B = U_B diag(s_B) V_B^T are decomposed once; U and V stay. A vector of ``size`` singular
    values, layer after layer in the order of ``names``, A's spectrum then B's, is a member.

    Attributes:
        names: sorted names of the adapted layers in the base model.
        size: the number of singular values.
        spectrum: [size], float32 on the CPU: the adapter's own singular values, descending within each factor.
        batched: True, one batch may hold rows of several members.

    Source: ESSA, arXiv 2507.04453.
    """

    batched = True

    def __init__(self, model: nn.Module, adapter_name: str, layers: list[tuple[str, Any]]) -> None:
        self._model, self._adapter_name = model, adapter_name
        self._layers: list[AdaptedLayer] = []
        spectra: list[Tensor] = []
        end = 0
        for name, module in layers:
            factors = Factors.decompose(module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight)
            start, middle = end, end + len(factors.s_a)
            end = middle + len(factors.s_b)
            self._layers.append(AdaptedLayer(name, module, factors, slice(start, middle), slice(middle, end)))
            spectra += factors.s_a, factors.s_b
        self._factor_sizes = [len(spectrum) for spectrum in spectra]
        self._projections = group(self._layers)
        self.names = [layer.name for layer in self._layers]
        self.size = end
        self.spectrum = torch.cat(spectra)

    @classmethod
    def from_peft(cls, model: nn.Module, adapter_name: str = "default") -> SVDLoRA:
        """Decompose the adapter of a model.

        Args:
            model: a PeftModel, or a transformers model with an injected LoRA. Its base layers may be quantised.
            adapter_name: the adapter to search; it must be the only active one.

        Raises:
            ValueError: there is no such LoRA adapter, or it uses what singular values cannot carry: DoRA and other
                variants, biases, retrained modules or tokens, layers that are not linear, routed experts. Or one of the
                factors is zero in every layer, as in a LoRA never trained, so there is nothing to take apart.
        """
        layers = find_lora_layers(model, adapter_name)
        for part in ("lora_A", "lora_B"):
            if not any(getattr(module, part)[adapter_name].weight.any() for _, module in layers):
                raise ValueError(
                    f"adapter {adapter_name!r}: {part} is zero in every layer, so it has no singular vectors to search "
                    f"along; train it first, for instance with `essa sft`"
                )
        return cls(model, adapter_name, layers)

    def top(self, alpha: float) -> Tensor:
        """The coordinates of the largest singular values: of each factor the top ``alpha``, rounded up.

        Args:
            alpha: the fraction, in (0, 1].

        Returns:
            [n], int64, ascending.

        Raises:
            ValueError: alpha is out of range.
        """
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {alpha!r}")
        picked: list[int] = []
        start = 0
        for size in self._factor_sizes:
            # The product may fall a hair above the whole number it stands for.
            picked += range(start, start + max(1, math.ceil(alpha * size - 1e-9)))
            start += size
        return torch.tensor(picked)

    @contextlib.contextmanager
    def attach(self, values: Tensor) -> Iterator[Population]:
        """Let the model compute a whole population; on leaving, the model is exactly what it was.

        Every adapted layer becomes its base layer, called as it is (or for few rows on a GPU fused with what follows, which
        rounds once where the two round twice), plus the rows' own LoRA delta, in the activations'
        dtype with float32 sums. The base layer's output is changed in place. There is no backward: run the model under
        ``torch.no_grad()`` or ``torch.inference_mode()``. LoRA dropout is not applied.

        Args:
            values: [members, size]: the singular values of each member.

        Yields:
            The population; call its ``assign`` before the first forward.

        Raises:
            ValueError: values are of another shape or not finite, or the adapter is no longer the active one.
            RuntimeError: a population is attached already, or another tool has replaced a layer's forward.
        """
        values = self._check_values(values, ("members", "size"))
        for layer in self._layers:
            check_active(layer.name, layer.module, self._adapter_name)
        scaled = values * self._scale().to(values.device)
        population = Population(len(values))
        forwards = [
            forward
            for projections in self._projections
            for forward in projections.forwards(population, scaled, self._adapter_name)
        ]
        with self._replaced(population, forwards):
            yield population

    def state(self, values: Tensor) -> dict[str, Tensor]:
        """One member as the tensors of a PEFT adapter file, on the CPU, with the adapter's own shapes and dtypes.

        Args:
            values: [size].

        Raises:
            ValueError: values are of another shape or not finite.
        """
        state = {}
        for layer, factors in self._compose(values):
            for part, factor in factors.items():
                key = f"base_model.model.{layer.name}.{part}.weight"
                state[key] = factor.to(self._parameter(layer, part).dtype).contiguous()
        return state

    def save_adapter(self, values: Tensor, output_dir: str | Path) -> None:
        """Write one member as an ordinary PEFT adapter folder: adapter_model.safetensors and adapter_config.json.

        The folder appears whole or not at all. Where one is there already, the new one takes its place in a single step,
        with the other files it holds; where the system cannot do that, a kill may leave it beside its place instead.

        Args:
            values: [size].
            output_dir: the folder.

        Raises:
            ValueError: values are of another shape or not finite.
            FileExistsError: output_dir is a file.
        """
        write_adapter_folder(self._model, self._adapter_name, self.state(values), Path(output_dir))

    @torch.no_grad()
    def load_(self, values: Tensor) -> None:
        """Write one member into the model's own adapter, whose weights it replaces. This object stays as it is.

        Args:
            values: [size].

        Raises:
            ValueError: values are of another shape or not finite.
        """
        for layer, factors in self._compose(values):
            for part, factor in factors.items():
                self._parameter(layer, part).copy_(factor)

    def _compose(self, values: Tensor) -> Iterator[tuple[AdaptedLayer, dict[str, Tensor]]]:
        values = self._check_values(values, ("size",)).cpu()
        for layer in self._layers:
            a, b = layer.factors.compose(values[layer.columns_a], values[layer.columns_b])
            yield layer, {"lora_A": a, "lora_B": b}

    def _parameter(self, layer: AdaptedLayer, part: str) -> Tensor:
        return getattr(layer.module, part)[self._adapter_name].weight

    def _scale(self) -> Tensor:
        """LoRA's scaling where B's singular values are, 1 where A's are."""
        scale = torch.ones(self.size)
        for layer in self._layers:
            scale[layer.columns_b] = layer.module.scaling[self._adapter_name]
        return scale

    def _check_values(self, values: Tensor, dims: tuple[str, ...]) -> Tensor:
        shape = f"[{', '.join(dims)}] with size = {self.size}"
        if not isinstance(values, Tensor) or not values.is_floating_point():
            raise ValueError(f"values must be a floating-point tensor of shape {shape}, got {values!r}")
        if values.dim() != len(dims) or values.shape[-1] != self.size or not values.numel():
            raise ValueError(f"values must have shape {shape}, got {list(values.shape)}")
        values = values.detach().float()
        if not torch.isfinite(values).all():
            raise ValueError("values must be finite, got NaN or infinity")
        return values
