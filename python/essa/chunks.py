"""Evaluating a generation chunk by chunk: some of its rows are completed and rated.

Row r of a generation is one completion: in the order of members, and of prompts within a member. What a chunk comes to
depends on the search's state, the generation, its prompts and the rows alone, so it does not matter which process
evaluates it; only numbers need to be told back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from essa.data import Prompts
from essa.evaluate import evaluate
from essa.rewards import Answer, Rewards
from essa.rollout import generate
from essa.scoring import log_probabilities
from essa.search import Search
from essa_kernels.nn import POINT


@dataclass(frozen=True)
class Task:
    """What it takes to evaluate a search: the same in every process that does.

    Attributes:
        model, processing_class: the model that the search was made for, and its tokenizer.
        prompts: the training prompts.
        eval_prompts: those to evaluate the solution on, if any.
        rewards: the reward functions.
        max_new_tokens, seed, row_budget: as in the run's settings.
    """

    model: torch.nn.Module
    processing_class: PreTrainedTokenizerBase
    prompts: Prompts
    eval_prompts: Prompts | None
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
        halved: how often rows were split because they did not fit into memory.
    """

    rewards: list[float]
    answers: list[Answer]
    tokens: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    halved: int = 0

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
            sum(chunk.halved for chunk in chunks),
        )


def evaluate_chunk(task: Task, search: Search, step: int, chosen: list[int], rows: range, state: Any = None) -> Chunk:
    """Complete and rate rows of generation ``step``.

    Args:
        chosen: the generation's prompts, by their place in ``task.prompts``.
        rows: which rows.
        state: the `TrainerState` that reward functions are shown.

    Rows that do not fit into memory are split in two, and those again.

    Raises:
        RewardError: a reward function failed.
    """
    try:
        return _evaluate_rows(task, search, step, chosen, rows, state)
    except (RuntimeError, MemoryError) as error:
        if len(rows) == 1 or not _is_out_of_memory(error):
            raise
    # Outside of the handler: while it is handled, the exception keeps what was computed so far alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = rows.start + len(rows) // 2
    halves = [range(rows.start, middle), range(middle, rows.stop)]
    joined = Chunk.join([evaluate_chunk(task, search, step, chosen, half, state) for half in halves])
    return dataclasses.replace(joined, halved=joined.halved + 1)


def _is_out_of_memory(error: Exception) -> bool:
    """The CPU allocator has no error class of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _evaluate_rows(task: Task, search: Search, step: int, chosen: list[int], rows: range, state: Any) -> Chunk:
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


def score_chunk(
    task: Task,
    search: Search,
    chosen: list[int],
    rows: range,
    answers: Sequence[Answer],
    members: np.ndarray,
    offsets: np.ndarray,
) -> np.ndarray:
    """`Strategy.tell`'s question, `Score`, as far as it is about members that gave their first answer in this chunk.

    Args:
        chosen, rows, answers: what the chunk was, and what came of it.
        members, offsets: the question: how likely is each member's answer, at an offset of its own?

    Returns:
        The scores that belong to `places_of` the chunk in the question, rounded to float32, as rewards are.
    """
    places = places_of(search, rows, len(chosen), members)
    if not len(places):
        return np.empty(0)
    first = {answer.member: answer for answer in reversed(answers)}
    asked = [first[member] for member in members[places].tolist()]
    encoded = dict(
        zip(chosen, task.processing_class([task.prompts.texts[i] for i in chosen])["input_ids"], strict=True)
    )
    scores = log_probabilities(
        task.model,
        [encoded[answer.prompt] for answer in asked],
        [answer.token_ids for answer in asked],
        space=search.space,
        values=torch.from_numpy(offsets[places]),
        temperature=search.temperature or 1.0,
        row_budget=task.row_budget,
    )
    return scores.float().double().numpy()


def places_of(search: Search, rows: range, prompts: int, members: np.ndarray) -> np.ndarray:
    """Where a question is about members that gave their first answer among these rows: places in it, ascending."""
    return np.flatnonzero(np.isin(members, search.starting(rows, prompts)))


class Local:
    """Evaluates generations in this process, one chunk after another."""

    def __init__(self, task: Task, search: Search) -> None:
        self._task, self._search = task, search
        self._chosen: list[int] = []
        self._answers: dict[range, list[Answer]] = {}

    def evaluate(self, step: int, chosen: list[int], state: Any = None) -> Chunk:
        """All rows of generation ``step``.

        Raises:
            RewardError: a reward function failed.
        """
        rows = self._search.chunks(len(chosen))
        chunks = {part: evaluate_chunk(self._task, self._search, step, chosen, part, state) for part in rows}
        self._chosen, self._answers = chosen, {part: chunk.answers for part, chunk in chunks.items()}
        return Chunk.join(list(chunks.values()))

    def score(self, members: np.ndarray, offsets: np.ndarray) -> list[float]:
        """`Score`, about the generation evaluated last."""
        scores = np.empty(len(members))
        for rows, answers in self._answers.items():
            places = places_of(self._search, rows, len(self._chosen), members)
            scores[places] = score_chunk(self._task, self._search, self._chosen, rows, answers, members, offsets)
        return scores.tolist()

    def measure(self, state: Any = None) -> dict[str, float]:
        """`essa.evaluate.evaluate` of the search's solution."""
        task = self._task
        assert task.eval_prompts is not None, "measure needs prompts to evaluate on"
        return evaluate(
            task.model,
            task.processing_class,
            task.eval_prompts,
            task.rewards,
            space=self._search.space,
            values=POINT,
            max_new_tokens=task.max_new_tokens,
            row_budget=task.row_budget,
            trainer_state=state,
        )
