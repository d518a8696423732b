"""Rates of this machine for `essa plan`, measured as a worker runs: with its threads, an adapter, and members in a chunk."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from essa.config import InputError, SFTConfig
from essa.models import adapter_name, bare, load_adapter, load_base, lora_config
from essa.plan import Job, Rates, between
from essa.rollout import generate
from essa_kernels.nn import SVDLoRA

STEPS = 8
"""Of decoding that are timed. Later ones attend to more, which is left out."""


def rates_here(
    name: str, job: Job, rows: int, *, adapter: str | None, threads: int, trust_remote_code: bool = False
) -> Callable[[int], Rates]:
    """Rates of one worker on this machine for chunks of any size, measured on ``rows`` sequences and a quarter of them.

    Args:
        name: folder or hub name of the model.
        adapter: that of its LoRA; None: a new one, as `essa sft` makes it.
        threads: CPU threads of a worker.
    """
    model: Any
    model, tokenizer = load_base(
        name, dtype=job.dtype, quantization=job.quantization, trust_remote_code=trust_remote_code
    )
    model = _with_new_adapter(model) if adapter is None else load_adapter(model, adapter)
    # Completions shall have their full length, whatever the model makes of the prompt.
    bare(model).generation_config.eos_token_id = []
    try:
        space = SVDLoRA.from_peft(model, adapter_name(model))
    except ValueError as error:
        raise InputError(str(error)) from error
    prompt = prompt_of(tokenizer, job.prompt_tokens)
    few, steps = max(1, rows // 4), min(STEPS, job.new_tokens)
    with _threads(threads):
        at_few, at_most = (
            measure_rates(model, tokenizer, prompt, count, space=space, prompts=job.prompts, steps=steps)
            for count in (few, rows)
        )
    return between((few, at_few), (rows, at_most))


def measure_rates(
    model: nn.Module, processing_class: Any, prompt: str, rows: int, *, space: SVDLoRA, prompts: int, steps: int
) -> Rates:
    """From short rollouts of one chunk on the model itself: of one token, and of `steps`.

    Args:
        rows: sequences in the chunk.
        space: of the model.
        prompts: that a member answers before the next member's turn.
    """
    values = space.spectrum.repeat(math.ceil(rows / prompts), 1)

    def seconds(new_tokens: int) -> float:
        rollout = generate(
            model,
            processing_class,
            [prompt] * prompts,
            space=space,
            values=values,
            max_new_tokens=new_tokens,
            row_budget=rows,
            rows=range(rows),
        )
        return rollout.seconds

    seconds(1)  # kernels and caches get warm
    prefill = min(seconds(1) for _ in range(2))
    return Rates(prefill, max(0.0, min(seconds(steps) for _ in range(2)) - prefill) / (steps - 1))


def prompt_of(tokenizer: Any, tokens: int) -> str:
    """A text of so many tokens, or a few less where words have several."""
    word = str(tokenizer.decode([len(tokenizer) // 2])) or " a"
    prompt, each = word, len(tokenizer(word)["input_ids"])
    while (missing := tokens - len(tokenizer(prompt)["input_ids"])) >= each:
        prompt += word * (missing // each)
    return prompt


def _with_new_adapter(model: Any) -> Any:
    config = lora_config(model, SFTConfig.lora_r, SFTConfig.lora_alpha, SFTConfig.lora_target_modules)
    # A factor that is zero has no singular vectors.
    config.init_lora_weights = False
    return get_peft_model(model, config)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
