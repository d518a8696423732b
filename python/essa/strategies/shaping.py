"""Fitness shaping: what a strategy makes of raw rewards before it learns from them."""

from __future__ import annotations

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
