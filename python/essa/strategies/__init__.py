"""Search strategies: which candidates to try next, given the rewards of those tried so far."""

from __future__ import annotations

import math
from typing import Any

from essa.config import suggest
from essa.strategies.base import Score, Strategy
from essa.strategies.es_per_completion import ESPerCompletion
from essa.strategies.zo_grpo import ZOGRPO

__all__ = ["DEFAULT_STRATEGY", "STRATEGIES", "Score", "Strategy", "make_strategy"]

STRATEGIES = ("cma", "cma-diagonal", "es-per-completion", "zo-grpo")
DEFAULT_STRATEGY = "es-per-completion"


def make_strategy(
    name: str = DEFAULT_STRATEGY,
    *,
    dim: int,
    population_size: int,
    prompts_per_generation: int,
    seed: int,
    sigma: float | None = None,
    lr: float | None = None,
) -> Strategy:
    """A fresh strategy.

    Args:
        name: one of `STRATEGIES`.
        dim: number of searched coordinates, at least 1.
        population_size: members per generation, at least 2.
        prompts_per_generation: prompts per generation, at least 1.
        seed: seed of the strategy's noise, 0 .. 2**64 - 1.
        sigma: initial standard deviation of the perturbations, above 0; None for the strategy's own.
        lr: step size of the gradient strategies, above 0; None for the strategy's own. CMA-ES has none.

    Raises:
        ValueError: an argument is out of range, or the population does not fit the strategy.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy: got {name!r}, allowed are {', '.join(STRATEGIES)}{suggest(str(name), STRATEGIES)}")
    for argument, value, least in (
        ("dim", dim, 1),
        ("population_size", population_size, 2),
        ("prompts_per_generation", prompts_per_generation, 1),
    ):
        if value < least:
            raise ValueError(f"{argument}: got {value}, must be at least {least}")
    for argument, size in (("sigma", sigma), ("lr", lr)):
        if size is not None and not (math.isfinite(size) and size > 0):
            raise ValueError(f"{argument}: got {size}, must be finite and above 0")
    settings: dict[str, Any] = {"dim": dim, "population_size": population_size, "seed": seed}
    settings |= {argument: size for argument, size in (("sigma", sigma), ("lr", lr)) if size is not None}
    if name in ("cma", "cma-diagonal"):
        if lr is not None:
            raise ValueError(f"lr: got {lr}, but strategy {name!r} has no learning rate")
        from essa.strategies.cma import CMA

        return CMA(**settings, diagonal=name == "cma-diagonal")
    settings["prompts_per_generation"] = prompts_per_generation
    return ZOGRPO(**settings) if name == "zo-grpo" else ESPerCompletion(**settings)
