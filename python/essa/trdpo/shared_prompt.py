"""Prompt sharing: a prompt and its completions as one sequence, so that the prompt is computed once (arXiv 2410.20305).

A batch is a single row without padding: prompt, first completion, second completion, next prompt, ... Positions restart
at the end of the prompt for every completion, and attention keeps the completions apart: prompt and first completion are
an ordinary causal sequence, a further completion sees the prompt and itself. The log-probabilities are those of separate
sequences.

It is done by an attention function of our own, which a model takes through transformers' attention interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from essa.models import bare

NAME = "essa_shared_prompt"

FAMILIES = frozenset(
    [
        "cohere",
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "starcoder2",
    ]
)
"""Model types whose every layer that mixes positions is an attention layer which hands our arguments through."""


def why_not(model: nn.Module) -> str | None:
    """Why prompts cannot be shared on this model, or None where they can."""
    kind = bare(model).config.get_text_config().model_type
    if kind not in FAMILIES:
        return (
            f"models of type {kind!r} are not among those it is known to be exact for ({', '.join(sorted(FAMILIES))})"
        )
    return None


class Branches:
    """The shape of a shared row: `lengths[i]` holds the tokens of prompt i and of each of its completions."""

    def __init__(self, lengths: list[list[int]]) -> None:
        self.lengths = lengths
        self._masks: dict[Any, Tensor] = {}

    def mask(self, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
        """What to add to the scores [queries, keys] of the last `queries` of `keys` positions: 0, or -inf if unseen."""
        key = (queries, keys, window, like.dtype)
        if key not in self._masks:
            ahead = torch.arange(keys, device=like.device)
            ahead = ahead - torch.arange(keys - queries, keys, device=like.device)[:, None]
            unseen = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
            self._masks[key] = torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill_(
                unseen, -torch.inf
            )
        return self._masks[key]


@contextmanager
def sharing(model: nn.Module) -> Iterator[None]:
    """Inside, the model attends along the `branches` it is called with. Backward passes belong inside too."""
    config = bare(model).config
    before = config._attn_implementation
    try:
        config._attn_implementation = NAME
        yield
    finally:
        config._attn_implementation = before


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    branches: Branches | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention along the branches of a row: query, key and value [1, heads, positions, size]."""
    if branches is None or attention_mask is not None:
        raise RuntimeError(f"{type(module).__name__} hands no branches, or a mask of its own, to its attention")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    attended: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> None:
        queries, keys = q.shape[2], k.shape[2]
        plain = queries == keys and (sliding_window is None or sliding_window >= keys)
        if softcap is not None:
            mask = branches.mask(queries, keys, sliding_window, q)
            attended.append(_capped(q, k, v, mask, scaling, softcap, dropout))
            return
        unseen = None if plain else branches.mask(queries, keys, sliding_window, q)
        attended.append(
            F.scaled_dot_product_attention(q, k, v, unseen, dropout_p=dropout, is_causal=plain, scale=scaling)
        )

    start = 0
    for prompt, first, *others in branches.lengths:
        end = start + prompt + first
        attend(*(tensor[:, :, start:end] for tensor in (query, key, value)))
        for length in others:
            own = slice(end, end + length)
            k, v = (torch.cat((t[:, :, start : start + prompt], t[:, :, own]), 2) for t in (key, value))
            attend(query[:, :, own], k, v)
            end += length
        start = end
    return torch.cat(attended, 2).transpose(1, 2).contiguous(), None


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float, dropout: float
) -> Tensor:
    """Attention with Gemma 2's soft cap on the scores."""
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap) + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v


AttentionInterface.register(NAME, attention)
