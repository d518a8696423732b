"""Steps along a gradient that is a weighted sum of noise: plain, with momentum, or Adam's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from essa.strategies.ascent import BETA1, BETA2, EPSILON
from essa_kernels import NoiseKey
from essa_kernels.nn import Parametrization


class Optimizer(Protocol):
    """Moves the parameters of a space."""

    def step(self, key: NoiseKey, weights: np.ndarray) -> None:
        """Move uphill along the sum of weights[n] x member n's noise."""
        ...


class SGD:
    """Adds the noise to the parameters as it is drawn; nothing is held beside them."""

    def __init__(self, space: Parametrization, lr: float):
        self._space, self._lr = space, lr

    def step(self, key: NoiseKey, weights: np.ndarray) -> None:
        self._space.add_noise_(self._space.parameters, key, (self._lr * weights).tolist())


class Momentum:
    """Steps along the gradients' moving average. Holds one tensor for each parameter."""

    def __init__(self, space: Parametrization, lr: float):
        self._space, self._lr = space, lr
        self._average = [torch.zeros_like(parameter) for parameter in space.parameters]

    def step(self, key: NoiseKey, weights: np.ndarray) -> None:
        for average in self._average:
            average.mul_(BETA1)
        self._space.add_noise_(self._average, key, ((1 - BETA1) * weights).tolist())
        for parameter, average in zip(self._space.parameters, self._average, strict=True):
            parameter.add_(average, alpha=self._lr)


class Adam:
    """Kingma and Ba 2015. Holds three tensors for each parameter: two averages and the gradient."""

    def __init__(self, space: Parametrization, lr: float):
        self._space, self._lr, self._steps = space, lr, 0
        self._gradient, self._average, self._square = (
            [torch.zeros_like(parameter) for parameter in space.parameters] for _ in range(3)
        )

    def step(self, key: NoiseKey, weights: np.ndarray) -> None:
        self._steps += 1
        for gradient in self._gradient:
            gradient.zero_()
        self._space.add_noise_(self._gradient, key, weights.tolist())
        pace = self._lr / (1 - BETA1**self._steps)
        spread = (1 - BETA2**self._steps) ** 0.5
        moments = zip(self._space.parameters, self._gradient, self._average, self._square, strict=True)
        for parameter, gradient, average, square in moments:
            average.lerp_(gradient, 1 - BETA1)
            square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            # The gradient has been used and now holds the divisor.
            torch.sqrt(square, out=gradient).div_(spread).add_(EPSILON)
            parameter.addcdiv_(average, gradient, value=pace)


OPTIMIZERS: dict[str, Callable[[Parametrization, float], Optimizer]] = {
    "sgd": SGD,
    "momentum": Momentum,
    "adam": Adam,
}
