"""Adam (Kingma and Ba 2015)."""

from __future__ import annotations

import numpy as np

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Adam:
    """Turns gradients into steps uphill: call it with a gradient [dim], add what it returns."""

    def __init__(self, dim: int, lr: float):
        self._lr = lr
        self._momentum = np.zeros(dim)
        self._square = np.zeros(dim)
        self._steps = 0

    def __call__(self, gradient: np.ndarray) -> np.ndarray:
        self._steps += 1
        self._momentum = BETA1 * self._momentum + (1 - BETA1) * gradient
        self._square = BETA2 * self._square + (1 - BETA2) * gradient**2
        momentum = self._momentum / (1 - BETA1**self._steps)
        square = self._square / (1 - BETA2**self._steps)
        return self._lr * momentum / (np.sqrt(square) + EPSILON)
