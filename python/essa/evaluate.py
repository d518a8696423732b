"""Evaluation: the mean reward of greedy completions, of the model as it is or of a point of the search."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from essa.data import Prompts
from essa.models import context_length
from essa.rewards import Answer, Rewards
from essa.rollout import generate


def check_prompts(
    dataset: Any,
    model: torch.nn.Module,
    processing_class: PreTrainedTokenizerBase,
    rewards: Rewards,
    *,
    name: str,
    max_new_tokens: int,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Prompts:
    """The dataset as `Prompts` that fit this model's context and have the columns these rewards need.

    Raises:
        InputError: naming the argument `name`, the row, and what is wrong with it.
    """
    context = context_length(model)
    room = None if context is None else context - max_new_tokens
    prompts = Prompts.check(dataset, processing_class, name=name, room=room, chat_template_kwargs=chat_template_kwargs)
    rewards.check_columns(prompts)
    return prompts


def evaluate(
    model: torch.nn.Module,
    processing_class: PreTrainedTokenizerBase,
    prompts: Prompts,
    rewards: Rewards,
    *,
    space: Any = None,
    values: Any = None,
    max_new_tokens: int,
    row_budget: int,
    trainer_state: Any = None,
) -> dict[str, float]:
    """Complete every prompt greedily and rate the completions.

    Args:
        space, values: a parametrisation and one member of it; both None takes the model as it is, with whatever adapter
            is active.

    Returns:
        `reward`: the mean (with 0/1 rewards, the accuracy); `samples`, `tokens`, `seconds`.

    Raises:
        RewardError: a reward function failed.
    """
    started = time.perf_counter()
    rated, tokens = complete_and_rate(
        model,
        processing_class,
        prompts,
        rewards,
        space=space,
        values=values,
        max_new_tokens=max_new_tokens,
        row_budget=row_budget,
        trainer_state=trainer_state,
    )
    return {
        "reward": float(rated.mean()),
        "samples": len(rated),
        "tokens": tokens,
        "seconds": time.perf_counter() - started,
    }


def complete_and_rate(
    model: torch.nn.Module,
    processing_class: PreTrainedTokenizerBase,
    prompts: Prompts,
    rewards: Rewards,
    *,
    space: Any,
    values: Any,
    max_new_tokens: int,
    row_budget: int,
    rows: range | None = None,
    trainer_state: Any = None,
) -> tuple[np.ndarray, int]:
    """The rewards of the prompts ``rows`` (None: all), completed greedily, and how many tokens that took."""
    rows = range(len(prompts)) if rows is None else rows
    rollout = generate(
        model,
        processing_class,
        prompts.texts,
        space=space,
        values=values,
        max_new_tokens=max_new_tokens,
        row_budget=row_budget,
        rows=rows,
    )
    answers = [
        Answer(0, row, completion.text, completion.token_ids)
        for row, completion in zip(rows, rollout.completions[0], strict=True)
    ]
    return rewards(prompts, answers, trainer_state), rollout.tokens
