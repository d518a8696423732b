"""Registration with torch and the argument checks the ops share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("essa", "DEF")  # a tenth of custom_op's cost per call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Expected = tuple[str, Tensor, torch.dtype, str, tuple[int, ...]]
"""One argument and what it must be: name, tensor, dtype, the names of its dimensions, shape."""


def register(schema: str, run: Callable, fake: Callable) -> Callable:
    """Define an op with its computation on real tensors and on fake ones; return what calls it."""
    name = schema.partition("(")[0]
    # Inductor must not hand over other strides than the checks saw in eager mode.
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"essa::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.essa, name).default


def check_tensors(op: str, device: torch.device, tensors: Iterable[Expected]) -> None:
    """Raise unless every tensor is contiguous on ``device`` with its dtype and shape."""
    for name, tensor, dtype, dims, shape in tensors:
        check_tensor(op, name, tensor, dtype, device, dims, shape)
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {list(tensor.stride())}")


def check_tensor(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device, dims: str, shape: tuple[int, ...]
) -> None:
    """Raise unless the tensor has the dtype, is on the device and has the shape, whose dimensions ``dims`` names."""
    if tensor.dtype is not dtype:
        raise ValueError(f"{op}: {name} must have dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must have shape [{dims}] = {list(shape)}, got {list(tensor.shape)}")


def check_dims(op: str, name: str, tensor: Tensor, dims: tuple[str, ...], may_be_empty: bool = False) -> None:
    """Raise unless the tensor has these dimensions, all at least 1; the first one may be 0 if ``may_be_empty``."""
    if tensor.dim() != len(dims) or 0 in (tensor.shape[1:] if may_be_empty else tensor.shape):
        at_least = ", ".join(f"{dim} >= {int(not may_be_empty or dim is not dims[0])}" for dim in dims)
        raise ValueError(f"{op}: {name} must have shape [{', '.join(dims)}] with {at_least}, got {list(tensor.shape)}")


def check_no_grad(op: str, **tensors: Tensor | None) -> None:
    """Raise if grad mode is on and an input requires grad: these ops have no backward."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{op}: {name} requires grad, but {op} has no backward; call it under torch.no_grad() or detach {name}"
            )
