"""How likely a population finds given completions: forward passes over prompt and completion, no decoding."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from essa.models import bare, whole_head_input
from essa_kernels.nn import Parametrization, SVDLoRA

# A batch is cut where its logits would have more elements than this: 1 GiB in float32.
MAX_LOGITS = 2**28


def log_probabilities(
    model: torch.nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    space: Parametrization | SVDLoRA,
    values: Any,
    temperature: float = 1.0,
    row_budget: int = 256,
) -> Tensor:
    """The mean log-probability of the tokens of each row's completion, under the row's own member.

    Args:
        model: a decoder-only transformers model or a PeftModel around one, in evaluation mode.
        prompt_ids, completion_ids: token ids, one list of each per row; none may be empty.
        space, values: a parametrisation of the model and the member of every row, as its ``attach`` takes them; for an
            `SVDLoRA` singular values, float32 [rows, size].
        temperature: divides the logits, above 0.
        row_budget: the most rows in a batch.

    Returns:
        float64 [rows], on the CPU.
    """
    base = bare(model)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    longest = max(len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True))
    step = min(row_budget, max(1, MAX_LOGITS // (longest * vocabulary)))
    scores = []
    with torch.inference_mode(), whole_head_input(base):
        for start in range(0, len(values), step):
            rows = slice(start, start + step)
            with space.attach(values[rows]) as population:
                population.assign(torch.arange(len(prompt_ids[rows]) + 1))
                scores.append(_score(base, prompt_ids[rows], completion_ids[rows], temperature))
    return torch.cat(scores)


def _score(
    model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], temperature: float
) -> Tensor:
    sequences = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    first, longest = min(map(len, prompts)), max(map(len, sequences))
    # Padding stands on the right, where causal attention keeps it from every token that counts.
    ids = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences])
    position = torch.arange(first, longest)
    starts = torch.tensor([[len(prompt)] for prompt in prompts])
    ends = torch.tensor([[len(sequence)] for sequence in sequences])
    counts = (position >= starts) & (position < ends)
    ids = ids.to(model.get_input_embeddings().weight.device)
    last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": longest - first} if last_only else {}
    logits = model(input_ids=ids[:, :-1], use_cache=False, **options).logits[:, first - longest :].float()
    picked = (logits / temperature).log_softmax(-1).gather(-1, ids[:, first:, None]).squeeze(-1)
    return (picked.double().cpu() * counts).sum(1) / counts.sum(1)
