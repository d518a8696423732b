"""The members' noise as tensors. `essa_kernels.noise` is the contract that fixes its bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import dispatch
from ..noise import MEMBER_END, NoiseKey, check_integer
from .registration import check_contiguous, check_counter, check_key, check_no_grad, matrix_of, register


def gaussian(
    shape: int | Sequence[int],
    key: NoiseKey,
    member: int = 0,
    *,
    out: Tensor | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """The standard normal noise of one member: the same bits on every backend.

    Args:
        shape: the shape of the noise matrix. Leading dimensions are flattened into rows, one dimension is one row, no
            dimension is one element.
        key: seed, generation and site.
        member: 0 .. 2**33 - 1. Member 2k + 1 has minus the noise of member 2k.
        out: where to write: float32, contiguous, of that shape. By default a new tensor.
        device: where a new tensor is made; by default torch's default device.
        backend: "cpu", "cuda", "triton" or "reference"; by default the best available (see `explain`).

    Returns:
        float32 of that shape, magnitudes up to sqrt(64 ln 2), about 6.66.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, out of range, or does not fit the others; or the
            matrix has more than 2**32 blocks, ``rows * ceil(cols / 64) * 16``.
        RuntimeError: the backend is not available.

    Source: Box and Muller, "A note on the generation of random normal deviates", 1958, on Philox4x32-10 (Salmon et
    al., SC 2011).
    """
    return _draw("gaussian", _gaussian_op, shape, key, member, out, device, backend)


def rademacher(
    shape: int | Sequence[int],
    key: NoiseKey,
    member: int = 0,
    *,
    out: Tensor | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """The random signs of one member, +1 or -1: the same bits on every backend.

    Arguments, result and errors are those of `gaussian`, but for the limit of ``rows * ceil(cols / 2048) * 16`` blocks.
    """
    return _draw("rademacher", _rademacher_op, shape, key, member, out, device, backend)


def _draw(op, call, shape, key, member, out, device, backend) -> Tensor:
    shape = _check_shape(op, shape)
    seed, generation, site = check_key(op, key)
    member = check_integer(f"{op}: member", member, MEMBER_END)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=device)
    elif device is not None or not _fits(out, shape):
        _check_out(op, out, shape, device)
    call(out, seed, generation, site, member, backend)
    return out


def _check_shape(op: str, shape: int | Sequence[int]) -> tuple[int, ...]:
    try:
        given: Any = (shape,) if hasattr(shape, "__index__") else shape
        sizes = torch.Size(given)
    except TypeError:
        raise TypeError(f"{op}: shape must be an integer or a sequence of integers, got {shape!r}") from None
    if any(size < 0 for size in sizes):
        raise ValueError(f"{op}: shape must have no negative size, got {list(sizes)}")
    check_counter(op, "shape", sizes, *matrix_of(sizes), op)
    return sizes


def _fits(out: object, shape: tuple[int, ...]) -> bool:
    return (
        isinstance(out, Tensor)
        and out.shape == shape
        and out.dtype is torch.float32
        and out.is_contiguous()
        and not out.requires_grad
    )


def _check_out(op: str, out: Tensor, shape: tuple[int, ...], device: torch.device | str | None) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"{op}: out must be a tensor, got {out!r}")
    if out.dtype is not torch.float32:
        raise ValueError(f"{op}: out must have dtype torch.float32, got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"{op}: out must have shape {list(shape)}, got {list(out.shape)}")
    check_contiguous(op, out=out)
    if device is not None and out.device != torch.empty(0, device=device).device:
        raise ValueError(f"{op}: device must be that of out, {out.device}, or None, got {device}")
    check_no_grad(op, out=out)


def _register(op: str):
    def run(out: Tensor, seed: int, generation: int, site: int, member: int, backend: str | None = None) -> None:
        implementation = dispatch.resolve(op, out.device, backend)
        if out.numel():
            implementation(
                out if out.dim() == 2 else out.view(matrix_of(out.shape)), seed % 2**64, generation, site, member
            )
            increment_version(out)

    def fake(out, seed, generation, site, member, backend=None) -> None:
        return None

    arguments = "Tensor(a!) out, SymInt seed, SymInt generation, SymInt site, SymInt member, str? backend=None"
    return register(f"{op}_({arguments}) -> ()", run, fake)


_gaussian_op = _register("gaussian")
_rademacher_op = _register("rademacher")
