"""Attention of one token a row in plain torch: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from .products import product


def decode_attention(out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> None:
    """out = softmax(scale q k^T) v over the positions that are seen."""
    (rows, kv_heads, length, _), (_, heads, d) = key.shape, query.shape
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, d)
    scores = scale * product(grouped, key.mT)
    seen = torch.ones(rows, length, dtype=torch.bool, device=query.device) if mask is None else mask
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    weights = torch.where(seen[:, None, None], (scores - scores.amax(-1, keepdim=True)).exp(), 0)
    total = weights.sum(-1, keepdim=True)
    result = product(weights, value) / torch.where(total > 0, total, 1)
    out.copy_(result.reshape(out.shape))
