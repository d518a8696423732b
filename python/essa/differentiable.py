"""Gradients through quantised linear layers whose product has no backward pass: torchao's int4.

The layer's weight is frozen, so that all there is to compute is the gradient of its input, gradient @ weight. The packing is
the backend's own, and nothing unpacks it: the weight's columns are asked for as products with rows of the identity, a block at
a time, so that they are the very numbers the forward pass multiplies by, and no unpacked weight is ever there as a whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

COLUMNS = 512
"""Of the weight, unpacked at a time."""


def make_differentiable(model: nn.Module) -> None:
    """Give the frozen linear layers of a model a backward pass where their quantisation has none."""
    known: dict[type, bool] = {}
    for module in model.modules():
        if type(module) is not nn.Linear or not hasattr(module.weight, "__tensor_flatten__"):
            continue
        kind = type(module.weight)
        if kind not in known:
            known[kind] = _has_backward(module.weight)
        if not known[kind]:
            module.__class__ = _Frozen


@contextlib.contextmanager
def taken_by_trainer(model: nn.Module) -> Iterator[None]:
    """Inside, transformers' Trainer can be made of an adapter on such layers. It knows of int4 that it cannot be trained on."""
    if not any(isinstance(module, _Frozen) for module in model.modules()):
        yield
        return
    # What makes it take the model as it is.
    vars(model)["_hf_peft_config_loaded"] = True
    try:
        yield
    finally:
        del vars(model)["_hf_peft_config_loaded"]


class _Frozen(nn.Linear):
    """A linear layer that hands gradients on to its input."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            product = _Product.apply(input, self.weight)
            return product if self.bias is None else product + self.bias
        return super().forward(input)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        weight = ctx.weight
        wide = weight.shape[1]
        found = [gradient @ _columns(weight, range(wide)[i : i + COLUMNS]).mT for i in range(0, wide, COLUMNS)]
        return torch.cat(found, -1), None


def _columns(weight: Tensor, which: range) -> Tensor:
    """Some of a quantised weight's columns, one a row: [len(which), out features], in the dtype it computes in."""
    one_hot = torch.zeros(len(which), weight.shape[1], dtype=weight.dtype, device=weight.device)
    one_hot[:, which.start : which.stop].fill_diagonal_(1)
    return F.linear(one_hot, weight)


def _has_backward(weight: Tensor) -> bool:
    x = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
    try:
        with torch.enable_grad():
            torch.autograd.grad(F.linear(x, weight).sum(), x)
    except RuntimeError:
        return False
    return True
