"""What a search strategy is, and the one source of its randomness."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import threadpoolctl

import essa_kernels
from essa_kernels.nn import Perturbed
from essa_kernels.noise import STRATEGY_SITE

BLAS = threadpoolctl.ThreadpoolController()
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Scores completions: for members int64 [rows] and offsets float32 [rows, dim], the mean log-probability per token of the
completion that each member gave (to its first prompt, if to several), under a model at the row's offset: float64 [rows].
"""


class Strategy(Protocol):
    """Ask for candidates, evaluate them, tell their rewards; generations count up from 0.

    A strategy keeps no other state than what its arguments, and the rewards and scores told so far, decide, and draws
    its noise by generation, so telling it all again from the start rebuilds it bit for bit.

    There are two kinds. One searches coordinates: it asks for offsets and has a mean. The other, for parametrisations
    whose coordinates are too many to list, asks for perturbations around the parametrisation's point, and moves it.

    One that needs less than every reward, such as the members' means, may have a method ``condense`` that says what: given
    rewards it returns, as float64 [members, any], what `tell` learns the same from, bit for bit, and given that the same
    again. It depends on nothing told so far. Workers then hear of no more than that.

    Attributes:
        name: the name `make_strategy` knows it by.
        assignment: "all" - every member answers every prompt of the generation; "per_prompt" - the members are split
            evenly among the prompts, in order, and each answers only its own.
        temperature: that of the sampling it is made for; 0 is greedy decoding.
        mean: float64 [dim], the current solution as an offset from the start; not always where `ask` looks next. None
            for a strategy that moves the parametrisation's point, which then is the solution.
        sigma: the current step size.
    """

    name: str
    assignment: str
    temperature: float

    @property
    def mean(self) -> np.ndarray | None: ...

    @property
    def sigma(self) -> float: ...

    def ask(self, generation: int) -> np.ndarray | Perturbed:
        """The members: offsets from the start, float32 [members, dim], or perturbations of the point."""
        ...

    def tell(self, generation: int, rewards: np.ndarray, score: Score) -> None:
        """Learns from the members' rewards, higher is better: float64 [members, prompts] ([members, 1] for
        "per_prompt"), in the order of `ask`. It may call `score` for this generation's completions."""
        ...


def standard_normal(shape: tuple[int, int], seed: int, generation: int, draw: int = 0) -> np.ndarray:
    """A generation's standard normals: float64 [rows, cols], from the noise contract. Draws are independent."""
    key = essa_kernels.NoiseKey(seed, generation, STRATEGY_SITE)
    return essa_kernels.gaussian(shape, key, 2 * draw, device="cpu").numpy().astype(np.float64)


def one_blas_thread() -> AbstractContextManager[object]:
    """For numpy's products, whose bits depend on its threads: a search must be the same wherever it is replayed."""
    return BLAS.limit(limits=1, user_api="blas")


def check_rewards(rewards: np.ndarray, members: int, prompts: int | None = None) -> np.ndarray:
    """`rewards` as float64 [members, prompts], or a ValueError that says what is wrong with them."""
    rewards = np.asarray(rewards, dtype=np.float64)
    wanted = f"[{members}, {'prompts' if prompts is None else prompts}]"
    if rewards.ndim != 2 or len(rewards) != members or rewards.shape[1] != (prompts or rewards.shape[1]):
        raise ValueError(f"rewards: got shape {list(rewards.shape)}, expected {wanted}")
    if not np.isfinite(rewards).all():
        member, prompt = np.argwhere(~np.isfinite(rewards))[0]
        raise ValueError(f"rewards: got {rewards[member, prompt]} for member {member}, prompt {prompt}; must be finite")
    return rewards
