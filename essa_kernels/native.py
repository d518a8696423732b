"""The compiled kernels behind the implementations' common signatures: tensors become addresses, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C  # type: ignore[attr-defined]

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def gaussian(out: Tensor, seed: int, generation: int, site: int, member: int) -> None:
    """Fill ``out`` (float32 [rows, cols], contiguous) with the member's standard normals."""
    _run("gaussian", out, out.data_ptr(), *out.shape, seed, generation, site, member)


def rademacher(out: Tensor, seed: int, generation: int, site: int, member: int) -> None:
    """Fill ``out`` (float32 [rows, cols], contiguous) with the member's signs."""
    _run("rademacher", out, out.data_ptr(), *out.shape, seed, generation, site, member)


def svd_lora_(
    y: Tensor, x: Tensor, v_a: Tensor, core: Tensor, u_b: Tensor, s_a: Tensor, s_b: Tensor, offsets: Tensor
) -> None:
    """y += u_b (s_b[m] * (core (s_a[m] * (v_a x)))), row by row."""
    (rows, d_in), (d_out, r_b), (members, r_a) = x.shape, u_b.shape, s_a.shape
    (y_stride, _), (x_stride, _), (u_row, u_column) = y.stride(), x.stride(), u_b.stride()
    # fmt: off
    _run(
        "svd_lora", y, y.data_ptr(), y_stride, x.data_ptr(), x_stride, v_a.data_ptr(), core.data_ptr(),
        u_b.data_ptr(), u_row, u_column, s_a.data_ptr(), s_b.data_ptr(), offsets.data_ptr(),
        rows, members, d_in, d_out, r_a, r_b, DTYPE_CODE[x.dtype],
    )
    # fmt: on


def svd_lora_shrink(h: Tensor, x: Tensor, v_a: Tensor, core: Tensor, s_a: Tensor, s_b: Tensor, offsets: Tensor) -> None:
    """h = s_b[m] * (core (s_a[m] * (v_a x))), row by row."""
    (rows, d_in), (members, r_a), (h_stride, _), (x_stride, _) = x.shape, s_a.shape, h.stride(), x.stride()
    # fmt: off
    _run(
        "svd_lora_shrink", h, h.data_ptr(), h_stride, x.data_ptr(), x_stride, v_a.data_ptr(), core.data_ptr(),
        s_a.data_ptr(), s_b.data_ptr(), offsets.data_ptr(),
        rows, members, d_in, r_a, core.shape[0], DTYPE_CODE[x.dtype],
    )
    # fmt: on


def svd_lora_expand_(y: Tensor, h: Tensor, u_b: Tensor) -> None:
    """y += u_b h, row by row."""
    (y_stride, _), (h_stride, _), (u_row, u_column) = y.stride(), h.stride(), u_b.stride()
    # fmt: off
    _run(
        "svd_lora_expand", y, y.data_ptr(), y_stride, h.data_ptr(), h_stride, u_b.data_ptr(), u_row, u_column,
        *y.shape, h.shape[1], DTYPE_CODE[y.dtype],
    )
    # fmt: on


def _run(kernel: str, result: Tensor, *arguments: int) -> None:
    """Run a kernel where its result is: on torch's threads, or on torch's current stream of that GPU."""
    if result.is_cpu:
        getattr(_C, f"{kernel}_cpu")(*arguments, torch.get_num_threads())
    else:
        with torch.cuda.device(result.device):
            getattr(_C, f"{kernel}_cuda")(*arguments, torch.cuda.current_stream().cuda_stream)
