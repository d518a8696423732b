"""GRPO's objective, climbed without a gradient: its slope is felt out by forward passes."""

from __future__ import annotations

import numpy as np

from essa.strategies.ascent import Ascent
from essa.strategies.base import Score, check_rewards, standard_normal
from essa.strategies.shaping import within_prompt

STEPS = 2
DIRECTIONS = 16
CLIP = 0.2


class ZOGRPO:
    """Completions are sampled from one point; perturbations only ask how likely those completions would become.

    A reward tells one perturbation little. So rewards are collected as in GRPO (Shao et al. 2024), by sampling, and
    compared within each prompt. The slope of the resulting objective, the mean of advantage x likelihood ratio, is then
    a matter of log-probabilities, which every forward pass over the given completions yields: each completion is scored
    at the point and at perturbations of its own, and the differences estimate the gradient (Spall 1992). Adam takes
    `STEPS` steps on one generation's completions, with fresh perturbations each; a completion whose ratio (per token,
    as in GSPO, Zheng et al. 2025) has left 1 +- `CLIP` in the wanted direction no longer counts. The mean is the average
    of the points so far.

    Args:
        dim: number of searched coordinates.
        population_size: completions per generation; prompts x at least two draws.
        prompts_per_generation: prompts per generation.
        sigma: standard deviation of the scored perturbations; small, but well above what the dtype rounds away.
        seed: 0 .. 2**64 - 1.
        lr: Adam's step size, in the units of the coordinates.
    """

    name = "zo-grpo"
    assignment = "per_prompt"
    temperature = 1.0

    def __init__(
        self,
        *,
        dim: int,
        population_size: int,
        prompts_per_generation: int,
        seed: int,
        sigma: float = 0.05,
        lr: float = 0.03,
    ):
        if population_size % prompts_per_generation or population_size < 2 * prompts_per_generation:
            raise ValueError(
                f"population_size: got {population_size}, {self.name} needs a multiple of the "
                f"{prompts_per_generation} prompts per generation, and at least two draws for each"
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
        return np.repeat(self._ascent.point[None].astype(np.float32), self.population_size, axis=0)

    def tell(self, generation: int, rewards: np.ndarray, score: Score) -> None:
        if generation != self._generation:
            raise ValueError(f"generation: got {generation}, expected {self._generation}")
        rewards = check_rewards(rewards, self.population_size, 1)
        advantages = within_prompt(rewards.reshape(self.prompts, -1)).reshape(-1)
        members = np.flatnonzero(advantages)
        if len(members):
            sampled_at = None
            for step in range(STEPS):
                noise, here, there = self._look_around(members, score, step)
                sampled_at = here if sampled_at is None else sampled_at
                weights = clipped(advantages[members], np.exp(here - sampled_at)) / self.population_size
                slopes = weights[:, None] * (there - here[:, None]) / self.sigma
                self._ascent.step(np.einsum("rk,rkd->d", slopes, noise) / slopes.shape[1])
        self._ascent.end_generation(generation)
        self._generation += 1

    def _look_around(self, members: np.ndarray, score: Score, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each completion's directions [rows, directions, dim], its score at the point [rows] and along them.

        The fewer completions count, the more directions each gets, lest the estimate get noisier as the model gets
        better.
        """
        rows, dim = len(members), len(self._ascent.point)
        directions = DIRECTIONS * self.population_size // rows
        noise = standard_normal((rows * directions, dim), self._seed, self._generation, draw=step)
        noise = noise.reshape(rows, directions, dim)
        points = np.concatenate([np.zeros((rows, 1, dim)), noise], axis=1) * self.sigma + self._ascent.point
        owners = np.repeat(members, 1 + directions)
        scores = score(owners, points.reshape(-1, dim).astype(np.float32)).reshape(rows, 1 + directions)
        return noise, scores[:, 0], scores[:, 1:]


def clipped(advantages: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """The slope of min(ratio x advantage, clip(ratio) x advantage) in the log-probability."""
    beyond = np.where(advantages > 0, ratios > 1 + CLIP, ratios < 1 - CLIP)
    return np.where(beyond, 0.0, advantages * ratios)
