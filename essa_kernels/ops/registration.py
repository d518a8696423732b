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
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"essa::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.essa, name).default


def check_tensors(op: str, device: torch.device, tensors: Iterable[Expected]) -> None:
    """Raise unless every tensor is contiguous on ``device`` with its dtype and shape."""
    for name, tensor, dtype, dims, shape in tensors:
        if tensor.dtype is dtype and tensor.shape == shape and tensor.device == device and tensor.is_contiguous():
            continue
        check_kind(op, name, tensor, dtype, device)
        check_shape(op, name, tensor, dims, shape)
        raise ValueError(f"{op}: {name} must be contiguous, got strides {list(tensor.stride())}")


def check_kind(op: str, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless the tensor has the dtype and is on the device."""
    if tensor.dtype is not dtype:
        raise ValueError(f"{op}: {name} must have dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")


def check_shape(op: str, name: str, tensor: Tensor, dims: str, shape: tuple[int, ...]) -> None:
    """Raise unless the tensor has the shape, whose dimensions are named by ``dims``."""
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must have shape [{dims}] = {list(shape)}, got {list(tensor.shape)}")


def check_rank(op: str, name: str, tensor: Tensor, dims: str, rank: int) -> None:
    """Raise unless the tensor has ``rank`` dimensions, none of them but the first empty."""
    if tensor.dim() != rank or 0 in tensor.shape[1:]:
        raise ValueError(f"{op}: {name} must have shape [{dims}], got {list(tensor.shape)}")


def check_no_grad(op: str, **tensors: Tensor | None) -> None:
    """Raise if grad mode is on and an input requires grad: these ops have no backward."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{op}: {name} requires grad, but {op} has no backward; call it under torch.no_grad() or detach {name}"
            )
