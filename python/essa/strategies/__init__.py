"""Search strategies: which candidates to try next, given the rewards of those tried so far."""

from __future__ import annotations

import math
from typing import Any

from essa.config import suggest
from essa.imports import import_named
from essa.strategies.base import Score, Strategy
from essa.strategies.es import ES
from essa.strategies.es_per_completion import ESPerCompletion
from essa.strategies.zo_grpo import ZOGRPO
from essa_kernels.nn import Parametrization

__all__ = ["STRATEGIES", "Score", "Strategy", "default_strategy", "make_strategy"]

STRATEGIES = ("cma", "cma-diagonal", "es-per-completion", "zo-grpo", "es")


def default_strategy(population_size: int, prompts_per_generation: int, temperature: float | None = None) -> str:
    """The most sample-efficient strategy that such a population can serve.

    zo-grpo samples at least two completions of every prompt; es-per-completion decodes greedily, with an even number
    of draws for every prompt; in CMA-ES any number of members answers every prompt.
    """
    draws, rest = divmod(population_size, prompts_per_generation)
    if not rest and draws >= 2 and temperature != 0:
        return "zo-grpo"
    return "cma-diagonal" if rest or draws % 2 else "es-per-completion"


def make_strategy(
    name: str | None = None,
    *,
    dim: int,
    population_size: int,
    prompts_per_generation: int,
    seed: int,
    sigma: float | None = None,
    lr: float | None = None,
    temperature: float | None = None,
    space: Parametrization | None = None,
    optimizer: str | None = None,
    reward_shaping: str | None = None,
    perturbation: str | None = None,
    weight_decay: float | None = None,
) -> Strategy:
    """A fresh strategy.

    Args:
        name: one of `STRATEGIES`, or `path.to.module:Class`; None for `default_strategy`, or "es" where the space is not of singular values.
        dim: number of searched coordinates, at least 1.
        population_size: members per generation, at least 2.
        prompts_per_generation: prompts per generation, at least 1.
        seed: seed of the strategy's noise, 0 .. 2**64 - 1.
        sigma: initial standard deviation of the perturbations, above 0; None for the strategy's own.
        lr: step size of the gradient strategies, above 0; None for the strategy's own. CMA-ES has none.
        temperature: that of the rollouts, 0 for greedy decoding; None for the strategy's own.
        space: the parametrisation that "es" moves; the others search coordinates, which "svd" alone can list.
        optimizer, reward_shaping, perturbation, weight_decay: of "es", see `ES`; None for its own.

    Raises:
        ValueError: an argument is out of range, or the population does not fit the strategy.
    """
    own = name is not None and ":" in name
    if name is not None and name not in STRATEGIES and not own:
        raise ValueError(f"strategy: got {name!r}, allowed are {', '.join(STRATEGIES)}{suggest(str(name), STRATEGIES)}")
    for argument, value, least in (
        ("dim", dim, 1),
        ("population_size", population_size, 2),
        ("prompts_per_generation", prompts_per_generation, 1),
    ):
        if value < least:
            raise ValueError(f"{argument}: got {value}, must be at least {least}")
    listed = space is None or space.name == "svd"
    if name is None:
        name = default_strategy(population_size, prompts_per_generation, temperature) if listed else "es"
    if name == "zo-grpo" and temperature == 0:
        raise ValueError("temperature must be above 0 for strategy 'zo-grpo', which samples; got 0")
    for argument, size in (("sigma", sigma), ("lr", lr)):
        if size is not None and not (math.isfinite(size) and size > 0):
            raise ValueError(f"{argument}: got {size}, must be finite and above 0")
    settings: dict[str, Any] = {"population_size": population_size, "seed": seed}
    settings |= {argument: size for argument, size in (("sigma", sigma), ("lr", lr)) if size is not None}
    of_es: dict[str, Any] = {
        "optimizer": optimizer,
        "reward_shaping": reward_shaping,
        "perturbation": perturbation,
        "weight_decay": weight_decay,
    }
    given = {argument: value for argument, value in of_es.items() if value is not None}
    if own:
        sizes = {"dim": dim, "space": space, "prompts_per_generation": prompts_per_generation}
        strategy = import_named("strategy", str(name), "class")(**sizes, **settings, **given)
        if strategy.mean is not None and not listed:
            raise ValueError(_lists_coordinates(name, space, dim))
        return strategy
    if name == "es":
        if space is None:
            raise ValueError("space: strategy 'es' needs the parametrisation that it moves, got None")
        return ES(space, **settings, **given, prompts_per_generation=prompts_per_generation)
    if given:
        argument, choice = next(iter(given.items()))
        raise ValueError(f"{argument}: got {choice!r}, but only strategy 'es' has it, not {name!r}")
    if not listed:
        raise ValueError(_lists_coordinates(name, space, dim))
    settings["dim"] = dim
    if name in ("cma", "cma-diagonal"):
        if lr is not None:
            raise ValueError(f"lr: got {lr}, but strategy {name!r} has no learning rate")
        from essa.strategies.cma import CMA

        return CMA(**settings, diagonal=name == "cma-diagonal")
    settings["prompts_per_generation"] = prompts_per_generation
    return ZOGRPO(**settings) if name == "zo-grpo" else ESPerCompletion(**settings)


def _lists_coordinates(name: str | None, space: Any, dim: int) -> str:
    return (
        f"strategy: got {name!r}, which searches a list of coordinates; parametrization {space.name!r} has {dim:,} and takes "
        f"'es'"
    )
