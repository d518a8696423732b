"""Evolution strategies on a parametrisation's own parameters, however many: the noise is never stored."""

from __future__ import annotations

import numpy as np

from essa.strategies.base import Score, check_rewards
from essa.strategies.optimizers import OPTIMIZERS
from essa.strategies.shaping import CONDENSED, SHAPINGS
from essa_kernels import NoiseKey
from essa_kernels.nn import Parametrization, Perturbed

# parametrisation -> sigma and learning rates by optimiser, that served on the demo's validation problems
DEFAULTS: dict[str, tuple[float, dict[str, float]]] = {
    "svd": (0.2, {"sgd": 0.03, "momentum": 0.03, "adam": 0.02}),
    "lora": (0.03, {"sgd": 5e-4, "momentum": 5e-4, "adam": 2e-3}),
    "lowrank": (0.01, {"sgd": 1e-4, "momentum": 1e-4, "adam": 5e-4}),
    "full": (0.01, {"sgd": 1e-4, "momentum": 1e-4, "adam": 3e-4}),
}


class ES:
    """Members 2k and 2k + 1 lie at point +- sigma * noise; their rewards, shaped, weigh the noise.

    The sum of weight x noise / (members x sigma) estimates the gradient of the expected reward (Salimans et al. 2017).
    With plain steps it is added to the parameters as it is drawn, so no gradient is ever held either.

    Args:
        space: the parametrisation, whose parameters this strategy moves.
        population_size: members per generation, even.
        prompts_per_generation: prompts per generation.
        sigma: standard deviation of the perturbations, constant.
        seed: 0 .. 2**64 - 1.
        lr: the optimiser's step size.
        optimizer: one of `OPTIMIZERS`.
        reward_shaping: one of `SHAPINGS`.
        perturbation: "member": every member answers every prompt; "completion": every completion has a perturbation of
            its own, as if each prompt had a population of its own.
        weight_decay: after a step of size lr, parameters have shrunk by lr x weight_decay besides.
    """

    name = "es"
    temperature = 0.0
    mean = None

    def __init__(
        self,
        space: Parametrization,
        *,
        population_size: int,
        prompts_per_generation: int,
        seed: int,
        sigma: float | None = None,
        lr: float | None = None,
        optimizer: str = "sgd",
        reward_shaping: str = "z-score",
        perturbation: str = "member",
        weight_decay: float = 0.0,
    ):
        own_sigma, own_lr = DEFAULTS.get(space.name, DEFAULTS["full"])
        multiple = 2 * prompts_per_generation if perturbation == "completion" else 2
        if population_size % multiple:
            why = f"an even number of draws for each of the {prompts_per_generation} prompts"
            raise ValueError(
                f"population_size: got {population_size}, strategy 'es' needs a multiple of {multiple} "
                f"({why if perturbation == 'completion' else 'members come in mirrored pairs'})"
            )
        if perturbation == "completion" and not space.batched:
            raise ValueError(
                f"perturbation: got 'completion', but parametrization {space.name!r} computes one member at a time; "
                f"use 'member'"
            )
        self.population_size = population_size
        self.assignment = "per_prompt" if perturbation == "completion" else "all"
        self.sigma = own_sigma if sigma is None else sigma
        self.lr = own_lr[optimizer] if lr is None else lr
        self.settings = {
            "learning_rate": self.lr,
            "optimizer": optimizer,
            "reward_shaping": reward_shaping,
            "perturbation": perturbation,
            "weight_decay": weight_decay,
        }
        """All of them, for a checkpoint, defaults as they were taken."""
        self._space = space
        self._prompts = prompts_per_generation
        self._seed = seed
        self._shape, self._condense = SHAPINGS[reward_shaping], CONDENSED[reward_shaping]
        self._optimizer = OPTIMIZERS[optimizer](space, self.lr)
        self._shrink = 1.0 - self.lr * weight_decay
        self._generation = 0

    def ask(self, generation: int) -> Perturbed:
        if generation != self._generation:
            raise ValueError(f"generation: got {generation}, expected {self._generation}")
        return Perturbed(self._key(), self.sigma, range(self.population_size))

    def condense(self, rewards: np.ndarray) -> np.ndarray:
        shared = self.assignment == "all"
        return self._condense(check_rewards(rewards, self.population_size).T).T if shared else rewards

    def tell(self, generation: int, rewards: np.ndarray, score: Score) -> None:
        self.ask(generation)
        if self.assignment == "per_prompt":
            rewards = check_rewards(rewards, self.population_size, 1).reshape(self._prompts, -1)
        else:
            rewards = self.condense(rewards).T
        weights = self._shape(rewards, self.assignment == "all") / (self.population_size * self.sigma)
        if weights.any():
            if self._shrink != 1.0:
                for parameter in self._space.parameters:
                    parameter.mul_(self._shrink)
            self._optimizer.step(self._key(), weights)
            self._space.moved()
        self._generation += 1

    def _key(self) -> NoiseKey:
        return NoiseKey(self._seed, self._generation)
