"""Random problems for svd_lora with their float64 truth and how far float32 arithmetic may be from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# rows of each member, d_in, d_out, r_a, r_b
SHAPES = {
    "one of everything": ([1], 1, 1, 1, 1),
    "ragged": ([3, 0, 1, 20, 0, 9], 129, 257, 8, 8),
    "aligned": ([16, 16], 256, 128, 16, 16),
    "odd": ([0, 0, 5, 2], 1134, 127, 7, 5),
    "one row each": ([1] * 70, 40, 66, 8, 4),
    "wide ranks": ([5, 12], 96, 130, 40, 72),
}

H_ERROR = {torch.float32: 0.0, torch.bfloat16: 2**-17, torch.float16: 0.0}  # of h as two bfloat16, each rounded
FLOAT32_ERROR = 2e-6  # of the sum of absolute terms; sums here have at most a few thousand


class Problem(NamedTuple):
    """y and x are rows of wider tensors, so that their rows are not adjacent."""

    y: Tensor
    x: Tensor
    v_a: Tensor
    core: Tensor
    u_b: Tensor
    s_a: Tensor
    s_b: Tensor
    offsets: Tensor

    @property
    def of_shrink(self) -> tuple[Tensor, ...]:
        return self.x, self.v_a, self.core, self.s_a, self.s_b, self.offsets


def problem(
    shape: str | tuple[list[int], int, int, int, int],
    dtype: torch.dtype,
    *,
    transposed: bool = False,
    device: str = "cpu",
) -> Problem:
    """A problem of a shape like those in SHAPES, or of one named there. ``transposed``: u_b lies as [r_b, d_out]."""
    counts, d_in, d_out, r_a, r_b = SHAPES[shape] if isinstance(shape, str) else shape
    rows, members = sum(counts), len(counts)
    u_b = torch.randn(r_b, d_out).T if transposed else torch.randn(d_out, r_b)
    tensors = (
        torch.randn(rows, d_out + 8).to(dtype),
        torch.randn(rows, d_in + 8).to(dtype),
        (torch.randn(r_a, d_in) / d_in**0.5).to(dtype),
        torch.randn(r_b, r_a) / r_a**0.5,
        (u_b / r_b**0.5).to(dtype),
        torch.rand(members, r_a) + 0.5,
        torch.rand(members, r_b) + 0.5,
        torch.tensor([0, *counts]).cumsum(0),
    )
    y, x, *rest = (tensor.to(device) for tensor in tensors)
    return Problem(y[:, :d_out], x[:, :d_in], *rest)


def _h(p: Problem) -> Tensor:
    owner = torch.arange(len(p.s_a), device=p.x.device).repeat_interleave(p.offsets.diff())
    shrunk = p.x.double() @ p.v_a.double().T * p.s_a.double()[owner]
    return shrunk @ p.core.double().T * p.s_b.double()[owner]


def _absolute(p: Problem) -> Problem:
    return Problem(*(tensor.abs() for tensor in p))


def assert_h(h: Tensor, p: Problem) -> None:
    """h is the shrink of p but for the rounding of float32 sums."""
    assert (h.double() - _h(p)).abs().le(FLOAT32_ERROR * _h(_absolute(p)) + 1e-30).all()


def assert_y(y: Tensor, p: Problem, h: Tensor | None = None, *, h_error: float = 0.0) -> None:
    """y is p's result but for float32 sums and one rounding to y's dtype.

    p.y is what y was before; h is given where the op took it from there. h_error is the relative error of h where it
    passes through a matrix unit as two bfloat16.
    """
    delta = (_h(p) if h is None else h.double()) @ p.u_b.double().T
    truth = p.y.double() + delta
    size = (_h(_absolute(p)) if h is None else h.double().abs()) @ p.u_b.double().abs().T + p.y.double().abs()
    rounding = 0.5 * torch.finfo(y.dtype).eps * truth.abs() + torch.finfo(y.dtype).smallest_normal
    allowed = (FLOAT32_ERROR + h_error) * size + rounding
    error = (y.double() - truth).abs()
    assert error.le(allowed).all(), f"largest error {(error / allowed).max():.3g} times the allowed one"
