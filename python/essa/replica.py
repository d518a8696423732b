"""A worker, but for Ray: a search that follows the driver's, on a model of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerState

from essa.chunks import Chunk, Task, evaluate_chunk, score_chunk
from essa.config import ESSAConfig, InputError
from essa.data import Prompts
from essa.evaluate import complete_and_rate
from essa.messages import pack, unpack
from essa.models import ModelSource, weight_digests
from essa.rewards import Answer, Reward, Rewards
from essa.search import Search, of_weights
from essa_kernels.nn import POINT


class WorkerError(InputError):
    """The workers cannot go on. The run itself is intact and can be resumed."""


@dataclass(frozen=True)
class Recipe:
    """What a worker is made of.

    Attributes:
        weights: digests of the driver's.
    """

    source: ModelSource
    args: ESSAConfig
    processing_class: PreTrainedTokenizerBase | None
    prompts: Prompts
    eval_prompts: Prompts | None
    reward_funcs: str | Reward | Sequence[str | Reward]
    weights: dict[str, str]


class Replica:
    """Hears the driver's news, and answers for the rows that it is asked about.

    News are messages, each about one thing: a generation that the search was ``told`` (as `Search.replay` takes it), what
    is ``asked`` now (a generation, its prompts), that generation's ``rewards`` as the strategy needs them, or the
    ``scores`` that answer the strategy's next question.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._asked: dict[str, Any] = {}
        self._rewards = np.empty(0)
        self._scores: list[np.ndarray] = []
        self._answers: dict[tuple[int, range], list[Answer]] = {}

    def start(self) -> None:
        """Load the model.

        Raises:
            InputError: it cannot be loaded here, or is not the driver's.
        """
        recipe, args, source = self._recipe, self._recipe.args, self._recipe.source
        torch.set_num_threads(args.threads_per_worker)
        if (args.gpus_per_worker or 0) > 1:
            source = dataclasses.replace(source, device="balanced")
        model, tokenizer = source.load(of_weights=of_weights(args))
        self._check_weights(model)
        self._search = Search(model, args)
        self._state = TrainerState(max_steps=args.generations)
        self._task = Task(
            model.eval(),
            recipe.processing_class or tokenizer,
            recipe.prompts,
            recipe.eval_prompts,
            Rewards(recipe.reward_funcs, args.reward_weights, args.reward_timeout),
            args.max_new_tokens,
            args.seed,
            args.row_budget,
        )

    def _check_weights(self, model: Any) -> None:
        """Candidates, which are compared later, tell only of the weights that are searched."""
        source = self._recipe.source
        for part, digest in weight_digests(model).items():
            if digest != self._recipe.weights[part]:
                name = source.adapter if part == "adapter" else source.name
                raise InputError(
                    f"{name!r} has other weights for a worker than for the driver; do all machines have the same files?"
                )

    def hear(self, news: Sequence[bytes]) -> None:
        """Take in what happened since this worker was last asked."""
        for message in news:
            ((kind, content),) = unpack(message).items()
            if kind == "told":
                self._search.replay(content)
            elif kind == "asked":
                self._asked, self._scores = content, []
            elif kind == "rewards":
                self._rewards = content
            else:
                self._scores.append(content)

    def evaluate(self, request: bytes, news: Sequence[bytes]) -> bytes:
        """Rewards of some rows. Raises RewardError."""
        rows = self._rows(request, news)
        step = self._asked["generation"]
        if self._search.digest(step) != self._asked["candidates"]:
            raise WorkerError(
                f"generation {step}: a worker's candidates are not the driver's; do all machines have the same "
                "versions of numpy, cma and essa-kernels, and the same kind of processor?"
            )
        chunk = self._evaluate(rows)
        told = {"tokens": chunk.tokens, "metrics": chunk.metrics, "halved": chunk.halved}
        return pack({"rewards": np.array(chunk.rewards), **{name: value for name, value in told.items() if value}})

    def score(self, request: bytes, news: Sequence[bytes]) -> bytes:
        """Scores of some rows' completions, as far as the strategy asks about them."""
        rows = self._rows(request, news)
        step, chosen = self._asked["generation"], self._asked["prompts"]
        if (step, rows) not in self._answers:  # another worker, dead by now, gave the answers
            self._evaluate(rows)
        question = self._search.asked(step, self._rewards, self._scores)
        assert question is not None, "the driver's strategy has a question, and this one is its copy"
        return pack(
            {"scores": score_chunk(self._task, self._search, chosen, rows, self._answers[step, rows], *question)}
        )

    def measure(self, request: bytes, news: Sequence[bytes]) -> bytes:
        """Rewards of the search's solution on some of the prompts to evaluate on. Raises RewardError."""
        rows, task = self._rows(request, news), self._task
        assert task.eval_prompts is not None, "the driver evaluates on the same prompts"
        self._state.global_step, self._state.epoch = self._asked["generation"], self._asked["epoch"]
        rated, tokens = complete_and_rate(
            task.model,
            task.processing_class,
            task.eval_prompts,
            task.rewards,
            space=self._search.space,
            values=POINT,
            max_new_tokens=task.max_new_tokens,
            row_budget=task.row_budget,
            rows=rows,
            trainer_state=self._state,
        )
        return pack({"rewards": rated, "tokens": tokens})

    def _rows(self, request: bytes, news: Sequence[bytes]) -> range:
        self.hear(news)
        return range(*unpack(request)["rows"])

    def _evaluate(self, rows: range) -> Chunk:
        step = self._asked["generation"]
        self._state.global_step, self._state.epoch = step, self._asked["epoch"]
        chunk = evaluate_chunk(self._task, self._search, step, self._asked["prompts"], rows, self._state)
        self._answers = {key: answers for key, answers in self._answers.items() if key[0] == step}
        self._answers[step, rows] = chunk.answers
        return chunk
