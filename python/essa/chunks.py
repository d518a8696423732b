"""Evaluating a generation chunk by chunk: some of its rows are completed and rated.

Row r of a generation is one completion: in the order of members, and of prompts within a member. What a chunk comes to
depends on the search's state, the generation, its prompts and the rows alone, so it does not matter which process
evaluates it; only numbers need to be told back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from essa.data import Prompts
from essa.rewards import Answer, Rewards
from essa.rollout import generate
from essa.scoring import log_probabilities
from essa.search import Search


@dataclass(frozen=True)
class Task:
    """What it takes to evaluate a search: the same in every process that does.

    Attributes:
        model, processing_class: the model that the search was made for, and its tokenizer.
        prompts: the training prompts.
        rewards: the reward functions.
        max_new_tokens, seed, row_budget: as in the run's settings.
    """

    model: torch.nn.Module
    processing_class: PreTrainedTokenizerBase
    prompts: Prompts
    rewards: Rewards
    max_new_tokens: int
    seed: int
    row_budget: int


@dataclass(frozen=True)
class Chunk:
    """What became of some rows of a generation.

    Attributes:
        rewards: one a row.
        answers: one a row; they are wanted again only by strategies that score completions.
        tokens: how many tokens were generated.
        seconds: how long generating took.
        metrics: what the reward functions logged, means over the rows.
    """

    rewards: list[float]
    answers: list[Answer]
    tokens: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def join(cls, chunks: Sequence[Chunk]) -> Chunk:
        """Chunks one after another as one."""
        metrics = {}
        for name in sorted({name for chunk in chunks for name in chunk.metrics}):
            logged = [(chunk.metrics[name], len(chunk.rewards)) for chunk in chunks if name in chunk.metrics]
            metrics[name] = sum(value * rows for value, rows in logged) / sum(rows for _, rows in logged)
        return cls(
            list(chain.from_iterable(chunk.rewards for chunk in chunks)),
            list(chain.from_iterable(chunk.answers for chunk in chunks)),
            sum(chunk.tokens for chunk in chunks),
            sum(chunk.seconds for chunk in chunks),
            metrics,
        )


def evaluate_chunk(task: Task, search: Search, step: int, chosen: list[int], rows: range, state: Any = None) -> Chunk:
    """Complete and rate rows of generation ``step``.

    Args:
        chosen: the generation's prompts, by their place in ``task.prompts``.
        rows: which rows.
        state: the `TrainerState` that reward functions are shown.

    Raises:
        RewardError: a reward function failed.
    """
    candidates = search.ask(step)
    rollout = generate(
        task.model,
        task.processing_class,
        [task.prompts.texts[i] for i in chosen],
        space=search.space,
        values=candidates,
        assignment=search.strategy.assignment,
        max_new_tokens=task.max_new_tokens,
        temperature=search.temperature,
        seed=task.seed,
        generation=step,
        row_budget=task.row_budget,
        rows=rows,
    )
    completions = chain.from_iterable(rollout.completions)
    answers = [
        Answer(member, chosen[place], completion.text, completion.token_ids)
        for (member, place), completion in zip(search.owners(rows, len(chosen)), completions, strict=True)
    ]
    rated = task.rewards(task.prompts, answers, state)
    return Chunk(rated.tolist(), answers, rollout.tokens, rollout.seconds, dict(task.rewards.metrics))


def score_answers(
    task: Task, search: Search, answers: Sequence[Answer], members: np.ndarray, offsets: np.ndarray
) -> list[float]:
    """`Strategy.tell`'s question, `Score`, about these answers: how likely is each member's, at an offset of its own?"""
    first = {answer.member: answer for answer in reversed(answers)}
    asked = [first[member] for member in members.tolist()]
    chosen = list({answer.prompt: None for answer in asked})
    encoded = dict(
        zip(chosen, task.processing_class([task.prompts.texts[i] for i in chosen])["input_ids"], strict=True)
    )
    return log_probabilities(
        task.model,
        [encoded[answer.prompt] for answer in asked],
        [answer.token_ids for answer in asked],
        space=search.space,
        values=torch.from_numpy(offsets),
        temperature=search.temperature or 1.0,
        row_budget=task.row_budget,
    ).tolist()


class Local:
    """Evaluates generations in this process, one chunk after another."""

    def __init__(self, task: Task, search: Search) -> None:
        self._task, self._search = task, search
        self._answers: list[Answer] = []

    def evaluate(self, step: int, chosen: list[int], state: Any = None) -> Chunk:
        """All rows of generation ``step``.

        Raises:
            RewardError: a reward function failed.
        """
        chunks = self._search.chunks(len(chosen))
        chunk = Chunk.join([evaluate_chunk(self._task, self._search, step, chosen, rows, state) for rows in chunks])
        self._answers = chunk.answers
        return chunk

    def score(self, members: np.ndarray, offsets: np.ndarray) -> list[float]:
        """`Score`, about the generation evaluated last."""
        return score_answers(self._task, self._search, self._answers, members, offsets)
