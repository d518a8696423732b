"""The compiled kernels behind the implementations' common signatures: tensors become addresses, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def gaussian(out: Tensor, seed: int, generation: int, site: int, member: int) -> None:
    """Fill ``out`` (float32 [rows, cols], contiguous) with the member's standard normals."""
    _launch("gaussian", out, out.data_ptr(), *out.shape, seed, generation, site, member)


def rademacher(out: Tensor, seed: int, generation: int, site: int, member: int) -> None:
    """Fill ``out`` (float32 [rows, cols], contiguous) with the member's signs."""
    _launch("rademacher", out, out.data_ptr(), *out.shape, seed, generation, site, member)


def svd_lora_(
    y: Tensor, x: Tensor, v_a: Tensor, core: Tensor, u_b: Tensor, s_a: Tensor, s_b: Tensor, offsets: Tensor
) -> None:
    """y += u_b (s_b[m] * (core (s_a[m] * (v_a x)))), row by row."""
    rows, d_in = x.shape
    d_out, r_b = u_b.shape
    members, r_a = s_a.shape
    _launch(
        "svd_lora",
        y,
        y.data_ptr(),
        y.stride(0),
        x.data_ptr(),
        x.stride(0),
        v_a.data_ptr(),
        core.data_ptr(),
        u_b.data_ptr(),
        *u_b.stride(),
        s_a.data_ptr(),
        s_b.data_ptr(),
        offsets.data_ptr(),
        rows,
        members,
        d_in,
        d_out,
        r_a,
        r_b,
        DTYPE_CODE[x.dtype],
    )


def svd_lora_shrink(h: Tensor, x: Tensor, v_a: Tensor, core: Tensor, s_a: Tensor, s_b: Tensor, offsets: Tensor) -> None:
    """h = s_b[m] * (core (s_a[m] * (v_a x))), row by row."""
    rows, d_in = x.shape
    members, r_a = s_a.shape
    _launch(
        "svd_lora_shrink",
        h,
        h.data_ptr(),
        h.stride(0),
        x.data_ptr(),
        x.stride(0),
        v_a.data_ptr(),
        core.data_ptr(),
        s_a.data_ptr(),
        s_b.data_ptr(),
        offsets.data_ptr(),
        rows,
        members,
        d_in,
        r_a,
        core.shape[0],
        DTYPE_CODE[x.dtype],
    )


def svd_lora_expand_(y: Tensor, h: Tensor, u_b: Tensor) -> None:
    """y += u_b h, row by row."""
    _launch(
        "svd_lora_expand",
        y,
        y.data_ptr(),
        y.stride(0),
        h.data_ptr(),
        h.stride(0),
        u_b.data_ptr(),
        *u_b.stride(),
        y.shape[0],
        *u_b.shape,
        DTYPE_CODE[y.dtype],
    )


def _launch(kernel: str, on: Tensor, *arguments: int) -> None:
    """Run the kernel on the tensor's device: on torch's threads, or in torch's current stream."""
    if on.is_cpu:
        getattr(_C, f"{kernel}_cpu")(*arguments, torch.get_num_threads())
    else:
        with torch.cuda.device(on.device):
            getattr(_C, f"{kernel}_cuda")(*arguments, torch.cuda.current_stream().cuda_stream)
