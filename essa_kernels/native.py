"""The compiled kernels behind the implementations' common signatures: tensors become addresses, sizes and strides."""

from __future__ import annotations

from collections.abc import Sequence

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


def lora_perturbed_(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    seed: int,
    generation: int,
    site: int,
    sigma: float,
    members: Tensor,
    offsets: Tensor,
    scaling: float,
    distribution: str,
) -> None:
    """y += scaling (B + sigma eps_B) ((A + sigma eps_A) x), row by row."""
    (rows, d_in), (d_out, rank) = x.shape, b.shape
    (y_stride, _), (x_stride, _), (b_row, b_column) = y.stride(), x.stride(), b.stride()
    # fmt: off
    _run(
        "lora_perturbed", y, y.data_ptr(), y_stride, x.data_ptr(), x_stride, a.data_ptr(), b.data_ptr(), b_row, b_column,
        seed, generation, site, sigma, members.data_ptr(), offsets.data_ptr(), scaling, distribution == "rademacher",
        rows, members.shape[0], d_in, d_out, rank, DTYPE_CODE[x.dtype], DTYPE_CODE[a.dtype],
    )
    # fmt: on


def lowrank_perturbed_(
    y: Tensor,
    x: Tensor,
    seed: int,
    generation: int,
    site: int,
    sigma: float,
    members: Tensor,
    offsets: Tensor,
    rank: int,
    distribution: str,
) -> None:
    """y += sigma / sqrt(rank) E (F^T x), row by row."""
    (rows, d_in), d_out, (y_stride, _), (x_stride, _) = x.shape, y.shape[1], y.stride(), x.stride()
    # fmt: off
    _run(
        "lowrank_perturbed", y, y.data_ptr(), y_stride, x.data_ptr(), x_stride, seed, generation, site, sigma,
        members.data_ptr(), offsets.data_ptr(), rank, distribution == "rademacher",
        rows, members.shape[0], d_in, d_out, DTYPE_CODE[x.dtype],
    )
    # fmt: on


def lowrank_update_(
    tensors: Sequence[Tensor],
    seed: int,
    generation: int,
    site: int,
    pair_weights: Tensor,
    rank: int,
    distribution: str,
) -> None:
    """tensor i += sum over pairs of pair_weights[pair] E F^T, E and F drawn from site + 2 i."""
    for i, tensor in enumerate(tensors):
        # fmt: off
        _run(
            "lowrank_update", tensor, tensor.data_ptr(), *tensor.shape, seed, generation, site + 2 * i,
            pair_weights.data_ptr(), pair_weights.shape[0], rank, distribution == "rademacher",
            DTYPE_CODE[tensor.dtype],
        )
        # fmt: on


def _run(kernel: str, result: Tensor, *arguments: float) -> None:
    """Run a kernel where its result is: on torch's threads, or on torch's current stream of that GPU."""
    if result.is_cpu:
        getattr(_C, f"{kernel}_cpu")(*arguments, torch.get_num_threads())
    else:
        with torch.cuda.device(result.device):
            getattr(_C, f"{kernel}_cuda")(*arguments, torch.cuda.current_stream().cuda_stream)
