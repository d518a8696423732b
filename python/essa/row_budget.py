"""`row_budget auto`: the number of sequences to a batch that decodes the most tokens a second, found by measuring."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import nn

from essa.devices import free_memory_for
from essa.models import bare
from essa.plan import Job, Shape, row_bytes
from essa.rollout import generate
from essa_kernels.nn import POINT

FIRST, STEPS = 8, 6
MEMORY_USED = 0.8
"""Part of the free memory that the largest batch may fill."""
BUDGET_SECONDS = 20.0
"""No further size is tried once measuring has taken this long."""


def choose_row_budget(
    model: nn.Module, processing_class: Any, space: Any, prompts: list[str], *, most: int, max_new_tokens: int
) -> tuple[int, dict[int, float]]:
    """Double the rows of a batch until they do not fit or make nothing faster; take the fastest.

    Each size is tried on the longest of the prompts, for a few tokens, with a member to a row. Whether the rows would
    fit with completions of their full length is calculated.

    Args:
        space: a parametrisation of the model.
        most: the rows of a generation; a larger batch has no use.
        max_new_tokens: the longest completion.

    Returns:
        The number of rows, and for each number tried the tokens a second.
    """
    started = time.perf_counter()
    prompt = max(prompts, key=lambda text: len(processing_class(text)["input_ids"]))
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    dtype = str(weight.dtype).removeprefix("torch.")
    job = Job(1, 1, len(processing_class(prompt)["input_ids"]), max_new_tokens, dtype=dtype)
    fitting = MEMORY_USED * free_memory_for(bare(model)) / row_bytes(Shape.of(model.config), job)
    rates: dict[int, float] = {}
    rows = min(FIRST, most)
    while True:
        try:
            rates[rows] = _tokens_a_second(model, processing_class, space, prompt, rows, min(STEPS, max_new_tokens))
        except torch.OutOfMemoryError:
            break
        slower = len(rates) > 2 and max(list(rates.values())[-2:]) < max(rates.values())
        if rows == most or slower or 2 * rows > fitting or time.perf_counter() - started > BUDGET_SECONDS:
            break
        rows = min(2 * rows, most)
    return max(rates, key=lambda rows: rates[rows]), rates


def _tokens_a_second(model: nn.Module, processing_class: Any, space: Any, prompt: str, rows: int, steps: int) -> float:
    def rate() -> float:
        rollout = generate(
            model,
            processing_class,
            [prompt] if space.batched else [prompt] * rows,
            space=space,
            values=dataclasses.replace(POINT, members=range(rows if space.batched else 1)),
            max_new_tokens=steps,
            row_budget=rows,
        )
        return rollout.tokens / rollout.seconds

    return max(rate() for _ in range(2))
