"""ESSA's population forward in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .products import linear, product


def svd_lora_shrink(h: Tensor, x: Tensor, v_a: Tensor, core: Tensor, s_a: Tensor, s_b: Tensor, offsets: Tensor) -> None:
    """h = s_b[m] * (core (s_a[m] * (v_a x))), row by row, where m is the member that owns the row."""
    members = torch.arange(s_a.shape[0], device=x.device)
    member = members.repeat_interleave(offsets.diff(), output_size=x.shape[0])
    shrunk = product(x, v_a.T) * s_a[member]
    h.copy_(product(shrunk, core.T) * s_b[member])


def svd_lora_expand_(y: Tensor, h: Tensor, u_b: Tensor) -> None:
    """y += u_b h, row by row."""
    y.copy_(y.float() + product(h, u_b.T))


def svd_lora_(
    y: Tensor,
    x: Tensor,
    v_a: Tensor,
    core: Tensor,
    u_b: Tensor,
    s_a: Tensor,
    s_b: Tensor,
    offsets: Tensor,
) -> None:
    """y += u_b (s_b[m] * (core (s_a[m] * (v_a x)))), row by row, where m is the member that owns the row."""
    h = x.new_empty(x.shape[0], core.shape[0], dtype=torch.float32)
    svd_lora_shrink(h, x, v_a, core, s_a, s_b, offsets)
    svd_lora_expand_(y, h, u_b)


def svd_lora_expand_linear(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, u_b: Tensor) -> None:
    """y = x weight^T + bias + u_b h, row by row."""
    sums = linear(x, weight, bias)
    svd_lora_expand_(sums, h, u_b)
    y.copy_(sums)


def svd_lora_linear(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    v_a: Tensor,
    core: Tensor,
    u_b: Tensor,
    s_a: Tensor,
    s_b: Tensor,
    offsets: Tensor,
) -> None:
    """y = x weight^T + bias + u_b (s_b[m] * (core (s_a[m] * (v_a x)))), row by row."""
    sums = linear(x, weight, bias)
    svd_lora_(sums, x, v_a, core, u_b, s_a, s_b, offsets)
    y.copy_(sums)
