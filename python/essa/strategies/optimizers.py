"""Steps along a gradient that is a weighted sum of noise: plain, with momentum, or Adam's.

A driver on the CPU and its workers on GPUs must take the same step, to the bit. So a step is made of what torch rounds alike
everywhere: sums, products and quotients of two tensors, and sums and products with a number. What it calls lerp_,
addcmul_, addcdiv_ or add_(alpha=...) is one rounding here and two there; a GPU divides by a number by multiplying with its
inverse; and the CPU's float32 square root, by MKL, is one bit off for one number in six.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from essa.strategies.ascent import BETA1, BETA2, EPSILON
from essa_kernels import NoiseKey
from essa_kernels.nn import Parametrization

BLOCK = 2**20
"""Elements that are held in float64 at a time."""


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
    """Steps along the gradients' moving average. Holds one tensor for each parameter: the next step."""

    def __init__(self, space: Parametrization, lr: float):
        self._space, self._lr = space, lr
        self._steps = [torch.zeros_like(parameter) for parameter in space.parameters]

    def step(self, key: NoiseKey, weights: np.ndarray) -> None:
        for step in self._steps:
            step.mul_(BETA1)
        self._space.add_noise_(self._steps, key, (self._lr * (1 - BETA1) * weights).tolist())
        for parameter, step in zip(self._space.parameters, self._steps, strict=True):
            parameter.add_(step)


class Adam:
    """Kingma and Ba 2015. Holds three tensors for each parameter: two sums, averages but for a factor, and the gradient."""

    def __init__(self, space: Parametrization, lr: float):
        self._space, self._lr, self._steps = space, lr, 0
        self._gradient, self._sum, self._squares = (
            [torch.zeros_like(parameter) for parameter in space.parameters] for _ in range(3)
        )

    def step(self, key: NoiseKey, weights: np.ndarray) -> None:
        self._steps += 1
        for gradient in self._gradient:
            gradient.zero_()
        self._space.add_noise_(self._gradient, key, weights.tolist())
        pace = self._lr * (1 - BETA1) / (1 - BETA1**self._steps)
        spread = (1 - BETA2) / (1 - BETA2**self._steps)
        moments = zip(self._space.parameters, self._gradient, self._sum, self._squares, strict=True)
        for parameter, gradient, total, squares in moments:
            total.mul_(BETA1).add_(gradient)
            squares.mul_(BETA2).add_(gradient.mul_(gradient))
            # The gradient has been used: its memory holds first the divisor, then the step.
            sqrt_(torch.mul(squares, spread, out=gradient)).add_(EPSILON)
            parameter.add_(torch.div(total, gradient, out=gradient).mul_(pace))


def sqrt_(tensor: torch.Tensor) -> torch.Tensor:
    """The correctly rounded square root of a contiguous float32 tensor, in place: that in float64, rounded once more."""
    for part in tensor.view(-1).split(BLOCK):
        part.copy_(part.double().sqrt_())
    return tensor


OPTIMIZERS: dict[str, Callable[[Parametrization, float], Optimizer]] = {
    "sgd": SGD,
    "momentum": Momentum,
    "adam": Adam,
}
