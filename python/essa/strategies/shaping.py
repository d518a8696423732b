"""Fitness shaping: what a strategy makes of raw rewards before it learns from them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def within_prompt(rewards: np.ndarray) -> np.ndarray:
    """Each prompt's rewards, centred and divided by their standard deviation: float64 [prompts, draws], the same out.

    How hard a prompt is says nothing about a perturbation; being better or worse than the other draws on the same
    prompt does. A prompt on which all draws got the same reward is left out: it gets zeros.
    """
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    spread = rewards.std(axis=1, keepdims=True)
    mixed = rewards.max(axis=1, keepdims=True) > rewards.min(axis=1, keepdims=True)
    return np.divide(centred, spread, out=np.zeros_like(centred), where=mixed)


def z_score(rewards: np.ndarray, shared: bool) -> np.ndarray:
    """The members' mean rewards, centred and divided by their standard deviation."""
    return within_prompt(_fitness(rewards, shared)[None])[0]


def centred_rank(rewards: np.ndarray, shared: bool) -> np.ndarray:
    """The members' ranks by mean reward, spread over -1/2 .. 1/2; equals share theirs (Salimans et al. 2017)."""
    fitness = _fitness(rewards, shared)
    _, place, counts = np.unique(fitness, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts + 1) / 2
    return ranks[place] / (len(fitness) - 1) - 0.5


def per_prompt(rewards: np.ndarray, shared: bool) -> np.ndarray:
    """Rewards as `within_prompt` has them. Those of a member that answered many prompts are averaged, then z-scored."""
    return z_score(mean_within_prompt(rewards), shared) if shared else within_prompt(rewards).reshape(-1)


def mean(rewards: np.ndarray) -> np.ndarray:
    """Each draw's mean reward: float64 [1, draws]."""
    return rewards.mean(axis=0, keepdims=True)


def mean_within_prompt(rewards: np.ndarray) -> np.ndarray:
    """Each draw's mean reward as `within_prompt` has it: float64 [1, draws]. One prompt has no scale to be rid of."""
    return mean(within_prompt(rewards)) if len(rewards) > 1 else rewards


def _fitness(rewards: np.ndarray, shared: bool) -> np.ndarray:
    return mean(rewards)[0] if shared else rewards.reshape(-1)


CONDENSED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "z-score": mean,
    "centred-rank": mean,
    "per-prompt": mean_within_prompt,
}
"""What a shaping needs of rewards float64 [prompts, draws] if draw d is the same member on every prompt: [1, draws], which
it makes the same weights of."""
SHAPINGS: dict[str, Callable[[np.ndarray, bool], np.ndarray]] = {
    "z-score": z_score,
    "centred-rank": centred_rank,
    "per-prompt": per_prompt,
}
"""Of rewards float64 [prompts, draws] and whether draw d is the same member on every prompt: one weight a member, float64
[draws], or else [prompts x draws], each row's members in order. All weights are 0 where nobody did better than anybody."""
