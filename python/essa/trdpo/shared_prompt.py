"""Prompt sharing: a prompt and its completions as one sequence, so that the prompt is computed once (arXiv 2410.20305).

A batch is a single row without padding: prompt, first completion, second completion, next prompt, ... Positions restart
at the end of the prompt for every completion, and attention keeps the completions apart: prompt and first completion are
an ordinary causal sequence, a further completion sees the prompt and itself. The log-probabilities are those of separate
sequences. With one completion to a prompt the row holds just separate sequences, packed without padding.

It is done by an attention function of our own, which a model takes through transformers' attention interface: one
FlexAttention call with a block mask for a model loaded with `attn_implementation="flex_attention"`, else one SDPA call a
branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward

from essa.models import bare

NAMES = {
    "eager": "essa_shared_prompt",
    "sdpa": "essa_shared_prompt",
    "flex_attention": "essa_shared_prompt_flex",
}
"""Our attention function for each `attn_implementation` of a model that there is one for."""

# Uncompiled it would hold the mask of all pairs of positions.
compiled_block_mask = torch.compile(create_block_mask)

FAMILIES = frozenset(
    [
        "cohere",
        "cohere2",
        "deepseek_v3",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm4",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "ministral",
        "mistral",
        "mixtral",
        "olmo2",
        "olmo3",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
    ]
)
"""Model types whose every layer that mixes positions is an attention layer which hands our arguments through."""


def why_not(model: nn.Module) -> str | None:
    """Why a row of branches is not for this model, or None where it is."""
    config = bare(model).config
    kind, implementation = config.get_text_config().model_type, config._attn_implementation
    if kind not in FAMILIES:
        return (
            f"models of type {kind!r} are not among those it is known to be exact for ({', '.join(sorted(FAMILIES))})"
        )
    if implementation not in NAMES:
        return f"attn_implementation must be one of {', '.join(NAMES)} for it, got {implementation!r}"
    return None


class Branches:
    """The shape of a row: `lengths[i]` holds the tokens of prompt i and of each completion behind it."""

    def __init__(self, lengths: list[list[int]]) -> None:
        self.lengths = lengths
        self._masks: dict[Any, Tensor] = {}
        self._block_masks: dict[Any, BlockMask] = {}

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

    def block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        """What every position of the row sees, for FlexAttention."""
        if window not in self._block_masks:
            # Numbers would be compiled in: what differs between layers and batches lies in tensors.
            ends, positions = (tensor.to(device) for tensor in self._ends_and_positions())
            earliest = torch.zeros_like(positions) if window is None else positions - window + 1

            def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return (key <= query) & (query < ends[key]) & (positions[key] >= earliest[query])

            self._block_masks[window] = compiled_block_mask(seen, None, None, len(ends), len(ends), device)
        return self._block_masks[window]

    def _ends_and_positions(self) -> tuple[Tensor, Tensor]:
        """Of every token: the first position of the row after it that does not see it, and its place in its sequence."""
        ends, positions, start = [], [], 0
        for prompt, *completions in self.lengths:
            ends.append(torch.full((prompt,), start + prompt + sum(completions)))
            positions.append(torch.arange(prompt))
            start += prompt
            for length in completions:
                start += length
                ends.append(torch.full((length,), start))
                positions.append(torch.arange(prompt, prompt + length))
        return torch.cat(ends), torch.cat(positions)


@contextmanager
def branching(model: nn.Module) -> Iterator[None]:
    """Inside, the model attends along the `branches` it is called with. Backward passes belong inside too."""
    config = bare(model).config
    before = config._attn_implementation
    try:
        config._attn_implementation = NAMES[before]
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
    branches = _handed(module, branches, attention_mask)
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


def flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    branches: Branches | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """`attention` as one call of FlexAttention, as transformers makes it."""
    mask = _handed(module, branches, attention_mask).block_mask(sliding_window, query.device)
    return flex_attention_forward(module, query, key, value, mask, **settings)[0], None


def _handed(module: nn.Module, branches: Branches | None, attention_mask: Tensor | None) -> Branches:
    if branches is None or attention_mask is not None:
        raise RuntimeError(f"{type(module).__name__} hands no branches, or a mask of its own, to its attention")
    return branches


AttentionInterface.register(NAMES["sdpa"], attention)
AttentionInterface.register(NAMES["flex_attention"], flex_attention)
