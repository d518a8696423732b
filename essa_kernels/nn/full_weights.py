"""ES at Scale: evolution strategies on all of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from .. import NoiseKey, es_update_, perturb_
from .model_weights import check_bare, check_floating, named_text_weights
from .parametrization import Perturbed
from .population import Attaching, Population
from .weights import Weights


class FullWeights(Attaching, Weights):
    """Every weight of a model that text goes through, each member's with noise of its own.

    The model computes one member at a time: its weights are perturbed in place, and afterwards copied back from the
    point, which is stored. They are never un-perturbed by arithmetic, which would round, so nothing drifts. Beside the
    model there are the point, in float32, and what the search started from; nothing grows with the population.

    Args:
        model: a transformers model without adapters.
        distribution: of the noise, "gaussian" or "rademacher".

    Attributes:
        names: sorted names of the weights; weights that the model ties are one.
        parameters: the weights; weight i's noise is drawn from site 2i.

    Raises:
        ValueError: the model carries an adapter, or a weight is not floating-point.

    Source: Evolution Strategies at Scale, arXiv 2509.24372.
    """

    name, batched = "full", False

    def __init__(self, model: Any, *, distribution: str = "gaussian") -> None:
        check_bare(model)
        weights = named_text_weights(model)
        for name, weight in weights:
            check_floating(name, weight)
        self.names = [name for name, _ in weights]
        self._distribution = distribution
        super().__init__(model, [weight for _, weight in weights], shared=False)

    @contextlib.contextmanager
    def attach(self, members: Perturbed) -> Iterator[Population]:
        """Make the model's weights those of one member; on leaving, they are exactly what they were.

        Args:
            members: a single one.

        Yields:
            The population; whatever its ``assign`` is told, all rows are the member's.

        Raises:
            ValueError: there are several members.
            RuntimeError: a member is attached already.
        """
        if len(members) != 1:
            raise ValueError(f"attach: full weights take one member at a time, got {len(members)}")
        with self._replaced(Population(1), []) as population:
            if not members.sigma:
                yield population
                return
            try:
                perturb_(self._weights, members.key, members.members[0], members.sigma, distribution=self._distribution)
                yield population
            finally:
                self.moved()

    def add_noise_(self, tensors: Sequence[Tensor], key: NoiseKey, weights: Sequence[float]) -> None:
        """As in `Parametrization`."""
        es_update_(tensors, key, weights, distribution=self._distribution)
