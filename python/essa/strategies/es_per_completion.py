"""An evolution strategy that gives every completion a perturbation of its own."""

from __future__ import annotations

import numpy as np

from essa.strategies.ascent import Ascent
from essa.strategies.base import Score, check_rewards, one_blas_thread, standard_normal
from essa.strategies.shaping import within_prompt


class ESPerCompletion:
    """Each prompt is answered by its own draws, in mirrored pairs: draws 2k and 2k + 1 lie at point +- sigma * noise.

    Rewards are compared within each prompt, as GRPO compares completions, and only prompts with mixed outcomes count.
    Their score-weighted noise estimates the gradient of the expected reward (Salimans et al. 2017), along
    which Adam moves the point; the mean is the average of the points so far.

    Args:
        dim: number of searched coordinates.
        population_size: completions per generation; prompts x an even number of draws.
        prompts_per_generation: prompts per generation.
        sigma: standard deviation of the perturbations, constant.
        seed: 0 .. 2**64 - 1.
        lr: Adam's step size, in the units of the coordinates.
    """

    name = "es-per-completion"
    assignment = "per_prompt"
    temperature = 0.0

    def __init__(
        self,
        *,
        dim: int,
        population_size: int,
        prompts_per_generation: int,
        seed: int,
        sigma: float = 0.3,
        lr: float = 0.05,
    ):
        if population_size % (2 * prompts_per_generation):
            raise ValueError(
                f"population_size: got {population_size}, {self.name} needs a multiple of "
                f"{2 * prompts_per_generation} (an even number of draws for each of the "
                f"{prompts_per_generation} prompts)"
            )
        self.population_size = population_size
        self.prompts = prompts_per_generation
        self.sigma = sigma
        self._seed = seed
        self._ascent = Ascent(dim, lr)
        self._generation = 0

    @property
    def mean(self) -> np.ndarray:
        return self._ascent.average

    def ask(self, generation: int) -> np.ndarray:
        if generation != self._generation:
            raise ValueError(f"generation: got {generation}, expected {self._generation}")
        noise = self._noise()
        candidates = np.empty((self.population_size, noise.shape[1]))
        candidates[0::2] = self._ascent.point + self.sigma * noise
        candidates[1::2] = self._ascent.point - self.sigma * noise
        return candidates.astype(np.float32)

    def tell(self, generation: int, rewards: np.ndarray, score: Score) -> None:
        if generation != self._generation:
            raise ValueError(f"generation: got {generation}, expected {self._generation}")
        rewards = check_rewards(rewards, self.population_size, 1)
        scores = within_prompt(rewards.reshape(self.prompts, -1)).reshape(-1)
        counted = np.count_nonzero(scores)
        if counted:
            pairs = scores[0::2] - scores[1::2]
            with one_blas_thread():
                gradient = pairs @ self._noise()
            self._ascent.step(gradient / (counted * self.sigma))
        self._ascent.end_generation(generation)
        self._generation += 1

    def _noise(self) -> np.ndarray:
        return standard_normal((self.population_size // 2, len(self._ascent.point)), self._seed, self._generation)
