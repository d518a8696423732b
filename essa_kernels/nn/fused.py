"""Layers in one kernel with what a population adds to them: on a GPU, for the few rows of decoding.

Such a layer takes as long as its weight is read: the 405 MB of a decoder layer of a 7B model in bfloat16 about 94 us on an
H200. What a population adds in launches of its own, 11 of them at about 2 us, takes a fifth of that.

Up to how many rows, `fused_layers` in few_rows.json says. It is reckoned, not measured yet: every tile of the result
reads all of x and V_A beside its own columns of the weight, so that L2 delivers 1 + (rows + rank) / columns times the
weight's bytes. With tiles of 64 columns (d_out = 4096) or 128 (11008) that is 1.3 times at 8 rows, 1.5 at 32 and 2 at 64:
at 6 TB/s less than 94 us, about 105, and 133, where launches of their own come to 116.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch, gpu
from .model_weights import is_plain

Forward = Callable[..., Tensor]


def fused_rows(layer: nn.Module) -> int:
    """For up to how many rows the layer is fused: 0 on a CPU, on a GPU for which nothing says so, without Triton, and for
    a layer that is not what `torch.nn.Linear` makes."""
    if type(layer) is not nn.Linear or not layer.weight.is_cuda or not is_plain(layer.weight):
        return 0
    if layer.weight.dtype not in (torch.bfloat16, torch.float16) or not layer.weight.is_contiguous():
        return 0
    if dispatch.unavailable("triton", "cuda"):
        return 0
    return gpu.few_rows("fused_layers", layer.weight.device)


def is_fused(layer: nn.Module, x: Tensor, rows: int) -> bool:
    """Whether a batch of a layer that is fused for up to so many rows is."""
    return (
        0 < x.numel() <= rows * x.shape[-1] and x.dtype is layer.weight.dtype and not torch.is_autocast_enabled("cuda")
    )


def is_hooked(layer: nn.Module) -> bool:
    """Whether a layer's call does more than its class's forward: then it is called."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks) or "forward" in vars(layer)


def fused_base(
    base_layer: nn.Module, forward: Forward, make_fused: Callable[[], Callable[[Tensor], Tensor]]
) -> Forward:
    """The forward of an adapted layer, which calls its base layer unless both are one kernel's: what `make_fused` makes."""
    rows = fused_rows(base_layer)
    if not rows:
        return forward
    fused = make_fused()

    def either(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if is_fused(base_layer, x, rows) and not is_hooked(base_layer):
            return fused(x)
        return forward(x, *args, **kwargs)

    return either
