"""EGGROLL: evolution strategies on full weights with low-rank noise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .. import NoiseKey, lowrank_perturbed, lowrank_perturbed_linear, lowrank_update_
from .fused import fused_rows, is_fused
from .model_weights import check_bare, check_floating, named_text_weights, of_routed_experts
from .parametrization import Perturbed, member_ids
from .population import Attaching, Forward, Population, own_forward
from .weights import Weights


class LowRankNoise(Attaching, Weights):
    """The weights of a model's linear layers, each member's with low-rank noise of its own.

    While a population is attached a layer computes ``x W^T`` as ever, and `lowrank_perturbed` adds each row's noise, or one
    kernel does both (`fused`); the weights themselves change only between generations. The output layer is left as it is,
    since it is often the embedding too, and so are routed experts, whose rows cannot be told apart by member, and what text
    does not go through.

    Args:
        model: a transformers model without adapters.
        rank: of the noise.
        distribution: of the factors' elements, "gaussian" or "rademacher".

    Attributes:
        names: sorted names of the layers.
        parameters: their weights [d_out, d_in]; layer i's noise is drawn from sites 2i and 2i + 1.

    Raises:
        ValueError: the model carries an adapter, has no linear layer, one whose weight is not floating-point, or two
            that share a weight.

    Source: EGGROLL, arXiv 2511.16652.
    """

    name, batched = "lowrank", True

    def __init__(self, model: Any, *, rank: int = 1, distribution: str = "gaussian") -> None:
        check_bare(model)
        self._layers = find_linear_layers(model)
        self._options: dict[str, Any] = {"rank": rank, "distribution": distribution}
        self.names = [name for name, _ in self._layers]
        weights = [module.weight.mT if _is_transposed(module) else module.weight for _, module in self._layers]
        super().__init__(model, weights, shared=True)

    @contextlib.contextmanager
    def attach(self, members: Perturbed) -> Iterator[Population]:
        """Let the model compute these members; on leaving, it is exactly what it was.

        Every layer's output has the rows' own noise added in place. There is no backward.

        Yields:
            The population; call its ``assign`` before the first forward.

        Raises:
            RuntimeError: a population is attached already, or another tool has replaced a layer's forward.
        """
        population = Population(len(members))
        layers = self._layers if members.sigma else []
        forwards = [
            (name, module, self._forward(position, module, members, population))
            for position, (name, module) in enumerate(layers)
        ]
        with self._replaced(population, forwards):
            yield population

    def add_noise_(self, tensors: Sequence[Tensor], key: NoiseKey, weights: Sequence[float]) -> None:
        """As in `Parametrization`."""
        lowrank_update_(tensors, key, weights, **self._options)

    def _forward(self, position: int, module: Any, members: Perturbed, population: Population) -> Forward:
        d_out, device = self.parameters[position].shape[0], self.parameters[position].device
        key, ids = members.key.at(site=members.key.site + 2 * position), member_ids(members, device)
        linear, offsets_for, options = own_forward(module), population.offsets_for, self._options
        rows = fused_rows(module)

        def forward(x: Tensor) -> Tensor:
            noise = (key, members.sigma, ids, offsets_for(x))
            if rows and is_fused(module, x, rows):
                return lowrank_perturbed_linear(x, module.weight, *noise, module.bias, **options)
            y = linear(x)
            if y.dtype is x.dtype:
                return lowrank_perturbed(x, d_out, *noise, y=y, **options)
            return y.add_(lowrank_perturbed(x, d_out, *noise, **options))

        return forward


def find_linear_layers(model: Any) -> list[tuple[str, Any]]:
    """The linear layers that text goes through, but for the output layer, routed experts and routers that return choices."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    of_text = {id(weight) for _, weight in named_text_weights(model)}
    found = [
        (name, module)
        for name, module in model.named_modules()
        if (_is_linear(module) or _is_transposed(module))
        and module is not head
        and id(module.weight) in of_text
        and not of_routed_experts(name)
    ]
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no linear layer besides its output layer")
    found.sort(key=lambda item: item[0])
    owners: dict[int, str] = {}
    for name, module in found:
        check_floating(name, module.weight)
        if (owner := owners.setdefault(id(module.weight), name)) != name:
            raise ValueError(f"model: {owner} and {name} share a weight, which would be perturbed twice")
    return found


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, and not one of the routers that inherit from it and return choices too."""
    return isinstance(module, nn.Linear) and "Router" not in type(module).__name__


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer whose weight is [d_in, d_out]."""
    return type(module).__name__ == "Conv1D"
