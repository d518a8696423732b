"""CMA-ES (Hansen and Ostermeier 2001) by pycma, with full or diagonal covariance."""

from __future__ import annotations

import math
import warnings

import cma
import numpy as np

from essa.strategies.base import Score, check_rewards, one_blas_thread, standard_normal


class CMA:
    """Every member answers every prompt; a member's fitness is its mean reward.

    Args:
        dim: number of searched coordinates.
        population_size: members per generation, at least 3.
        sigma: initial step size.
        seed: 0 .. 2**64 - 1.
        diagonal: adapt variances only (separable CMA-ES): linear in `dim`, and faster to learn them.
    """

    assignment = "all"
    temperature = 0.0

    def __init__(self, *, dim: int, population_size: int, seed: int, diagonal: bool, sigma: float = 0.3):
        if population_size < 3:
            raise ValueError(f"population_size: got {population_size}, CMA-ES needs at least 3")
        self.name = "cma-diagonal" if diagonal else "cma"
        self.population_size = population_size
        self._seed = seed
        self._generation = 0
        self._candidates: list[np.ndarray] | None = None
        options = {
            "popsize": population_size,
            "CMA_diagonal": diagonal,
            "CMA_mirrors": 0,
            "randn": self._randn,
            "seed": math.nan,
            "signals_filename": None,
            "verbose": -9,
            "verb_disp": 0,
            "verb_log": 0,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pycma warns of its own default options
            self._search = cma.CMAEvolutionStrategy(np.zeros(dim), sigma, options)

    @property
    def mean(self) -> np.ndarray:
        return np.array(self._search.mean, dtype=np.float64)

    @property
    def sigma(self) -> float:
        return float(self._search.sigma)

    def ask(self, generation: int) -> np.ndarray:
        return np.array(self._asked(generation), dtype=np.float32)

    def condense(self, rewards: np.ndarray) -> np.ndarray:
        return check_rewards(rewards, self.population_size).mean(axis=1, keepdims=True)

    def tell(self, generation: int, rewards: np.ndarray, score: Score) -> None:
        # pycma's own stopping criteria are never asked: with few prompts, equal rewards are common and mean nothing.
        candidates = self._asked(generation)
        fitness = self.condense(rewards)[:, 0]
        with one_blas_thread():
            self._search.tell(candidates, list(-fitness))
        self._let_go(candidates)
        self._candidates = None
        self._generation += 1

    def _asked(self, generation: int) -> list[np.ndarray]:
        if generation != self._generation:
            raise ValueError(f"generation: got {generation}, expected {self._generation}")
        if self._candidates is None:
            with one_blas_thread():
                self._candidates = self._search.ask()
            self._search.ary = None  # as large as they are
        return self._candidates

    def _let_go(self, candidates: list[np.ndarray]) -> None:
        """Drops the references by which pycma would keep all these candidates during the next evaluation."""
        candidates.clear()  # its record of the call has this list
        self._search.pop_sorted = None
        self._search.best = type(self._search.best)()  # a row of the matrix of all

    def _randn(self, rows: int, cols: int) -> np.ndarray:
        return standard_normal((rows, cols), self._seed, self._generation)
