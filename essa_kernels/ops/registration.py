"""Registration with torch and the argument checks the ops share."""

from __future__ import annotations

from collections.abc import Callable

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


# The checks run on every call, and reading a property of a tensor costs about 0.1 us: each is read once.


def check_no_grad(op: str, **tensors: Tensor) -> None:
    """Raise if grad mode is on and an input requires grad: these ops have no backward."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise RuntimeError(
                f"{op}: {name} requires grad, but {op} has no backward; call it under torch.no_grad() or detach {name}"
            )


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless the tensor has a supported dtype and at least one dimension."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{op}: {name} must have dtype float32, bfloat16 or float16, got {tensor.dtype}")
    if tensor.dim() == 0:
        raise ValueError(f"{op}: {name} must have at least one dimension, got none")


def check_matrix(op: str, name: str, tensor: Tensor, dims: str, rows_at_least: int = 1) -> tuple[int, int]:
    """The sizes of a tensor that must be a matrix with columns and at least so many rows."""
    shape = tensor.shape
    if len(shape) != 2 or shape[0] < rows_at_least or shape[1] < 1:
        sizes = " and ".join(f"{dim} >= {size}" for dim, size in zip(dims.split(", "), (rows_at_least, 1), strict=True))
        raise ValueError(f"{op}: {name} must have shape [{dims}] with {sizes}, got {list(shape)}")
    return shape


def check_tensors(op: str, device: torch.device, *tensors: Expected) -> None:
    """Raise unless every tensor has its dtype and shape and is on ``device``."""
    for name, tensor, dtype, dims, shape in tensors:
        if tensor.dtype is not dtype:
            raise ValueError(f"{op}: {name} must have dtype {dtype}, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} must have shape [{dims}] = {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")


def check_contiguous(op: str, **tensors: Tensor) -> None:
    """Raise unless every tensor is contiguous."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {list(tensor.stride())}")
