"""Climbing along noisy gradients: Adam (Kingma and Ba 2015) with averaged iterates (Polyak and Juditsky 1992)."""

from __future__ import annotations

import numpy as np

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Ascent:
    """A point that climbs, and the average of where it has been.

    A constant step keeps exploring, so the point itself never settles; the average does.

    Attributes:
        point: float64 [dim].
        average: float64 [dim], over the generations so far, each weighted by its number: old ones fade.
    """

    def __init__(self, dim: int, lr: float):
        self.point = np.zeros(dim)
        self.average = np.zeros(dim)
        self._lr = lr
        self._momentum = np.zeros(dim)
        self._square = np.zeros(dim)
        self._steps = 0

    def step(self, gradient: np.ndarray) -> None:
        """Move the point along an estimated gradient [dim], uphill."""
        self._steps += 1
        self._momentum = BETA1 * self._momentum + (1 - BETA1) * gradient
        self._square = BETA2 * self._square + (1 - BETA2) * gradient**2
        momentum = self._momentum / (1 - BETA1**self._steps)
        square = self._square / (1 - BETA2**self._steps)
        self.point = self.point + self._lr * momentum / (np.sqrt(square) + EPSILON)

    def end_generation(self, generation: int) -> None:
        """Take the point into the average; generations count from 0."""
        self.average = self.average + 2 / (generation + 2) * (self.point - self.average)
