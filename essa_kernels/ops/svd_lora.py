"""ESSA's population forward: every row takes the LoRA whose singular values are those of its own member."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .registration import (
    DTYPES,
    Expected,
    check_kind,
    check_no_grad,
    check_rank,
    check_shape,
    check_tensors,
    register,
)


def svd_lora(
    x: Tensor,
    v_a: Tensor,
    core: Tensor,
    u_b: Tensor,
    s_a: Tensor,
    s_b: Tensor,
    offsets: Tensor,
    y: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The LoRA delta of a batch whose rows belong to members that differ in their singular values.

    With A = U_A diag(s_a) V_A^T and B = U_B diag(s_b) V_B^T, member m adds ``B A x`` to its rows:
    ``y += u_b (s_b[m] * (core (s_a[m] * (v_a x))))``, where core = V_B^T U_A. Sums are in float32. No backward.

    Args:
        x: [..., d_in], float32, bfloat16 or float16; leading dimensions are flattened into rows; any strides.
        v_a: [r_a, d_in], x's dtype: V_A^T.
        core: [r_b, r_a], float32.
        u_b: [d_out, r_b], x's dtype.
        s_a: [members, r_a], float32.
        s_b: [members, r_b], float32, with LoRA's scaling folded in.
        offsets: [members + 1], int64: member m owns rows offsets[m] .. offsets[m + 1] - 1. Starts with 0, never
            descends, ends with the number of rows; groups may be empty. Its content is checked on the CPU; on a GPU,
            where looking would stall the stream, it is trusted.
        y: [..., d_out], x's dtype: accumulated in place. Its rows may have any stride, their elements are adjacent.
            It must not share memory with x. By default zeros.
        backend: "cpu", "cuda", "triton" or "reference"; by default the best available (see `explain`).

    All tensors are on one device; all but x and y are contiguous. Sizes are >= 1, but rows and members may be 0.

    Returns:
        y, or without it a new [..., d_out] tensor that holds the delta alone.

    Raises:
        ValueError: a dtype, device, shape or stride is not as above, or offsets do not cover the rows.
        RuntimeError: the backend is not available, or an input requires grad while grad mode is on.

    Source: ESSA, arXiv 2507.04453.
    """
    if y is None:
        return _svd_lora_op(x, v_a, core, u_b, s_a, s_b, offsets, backend)
    _svd_lora_inplace_op(y, x, v_a, core, u_b, s_a, s_b, offsets, backend)
    return y


def svd_lora_shrink(
    x: Tensor,
    v_a: Tensor,
    core: Tensor,
    s_a: Tensor,
    s_b: Tensor,
    offsets: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """The first half of `svd_lora`, up to u_b, for projections that share one x.

    ``h = s_b[m] * (core (s_a[m] * (v_a x)))`` for the rows of every member m. For a group of projections stack their
    v_a, make core block-diagonal and concatenate their s_a and s_b; projection i then expands its columns of h.

    Args:
        x, v_a, core, s_a, s_b, offsets, backend: as in `svd_lora`.

    Returns:
        h: [rows, r_b], float32.

    Raises:
        ValueError, RuntimeError: as `svd_lora`.
    """
    return _shrink_op(x, v_a, core, s_a, s_b, offsets, backend)


def svd_lora_expand_(y: Tensor, h: Tensor, u_b: Tensor, *, backend: str | None = None) -> Tensor:
    """The second half of `svd_lora`, in place: ``y += u_b h`` for every row.

    Args:
        y: [..., d_out], float32, bfloat16 or float16, as in `svd_lora`.
        h: [rows, r_b], float32, from `svd_lora_shrink`, or some of its columns.
        u_b: [d_out, r_b], y's dtype, contiguous.
        backend: as in `svd_lora`.

    Returns:
        y.

    Raises:
        ValueError, RuntimeError: as `svd_lora`.
    """
    _expand_op(y, h, u_b, backend)
    return y


def _check_shrink(op, x, v_a, core, s_a, s_b, offsets) -> None:
    check_no_grad(op, x=x, v_a=v_a, core=core, s_a=s_a, s_b=s_b)
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: x must have dtype float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must have shape [..., d_in], got {list(x.shape)}")
    check_rank(op, "v_a", v_a, "r_a, d_in", 2)
    check_rank(op, "core", core, "r_b, r_a", 2)
    check_rank(op, "s_a", s_a, "members, r_a", 2)
    (r_a, r_b), members = (v_a.shape[0], core.shape[0]), s_a.shape[0]
    expected: tuple[Expected, ...] = (
        ("v_a", v_a, x.dtype, "r_a, d_in", (r_a, x.shape[-1])),
        ("core", core, torch.float32, "r_b, r_a", (r_b, r_a)),
        ("s_a", s_a, torch.float32, "members, r_a", (members, r_a)),
        ("s_b", s_b, torch.float32, "members, r_b", (members, r_b)),
        ("offsets", offsets, torch.int64, "members + 1", (members + 1,)),
    )
    check_tensors(op, x.device, expected)


def _check_offsets(op: str, offsets: Tensor, rows: int) -> None:
    """On the CPU only: looking at a GPU's memory would wait for it."""
    if not offsets.is_cpu:
        return
    values = offsets.tolist()
    if values[0] == 0 and values[-1] == rows and values == sorted(values):
        return
    if values[0] != 0 or values[-1] != rows:
        raise ValueError(f"{op}: offsets must start with 0 and end with rows = {rows}, got {values[0]} and {values[-1]}")
    m = next(m for m in range(len(values) - 1) if values[m] > values[m + 1])
    raise ValueError(f"{op}: offsets must not descend, got offsets[{m}] = {values[m]}, offsets[{m + 1}] = {values[m + 1]}")


def _check_expand(op, y, u_b, r_b) -> None:
    check_rank(op, "u_b", u_b, "d_out, r_b", 2)
    if u_b.shape[0] == 0:
        raise ValueError(f"{op}: u_b must have shape [d_out, r_b], got {list(u_b.shape)}")
    check_tensors(op, y.device, (("u_b", u_b, y.dtype, "d_out, r_b", (u_b.shape[0], r_b)),))


def _rows_of_x(x: Tensor) -> Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _rows_of_y(op: str, y: Tensor) -> Tensor:
    if y.stride(-1) == 1 or y.shape[-1] == 1:
        try:
            return y if y.dim() == 2 else y.view(-1, y.shape[-1])
        except RuntimeError:
            pass
    raise ValueError(f"{op}: y must be rows of adjacent elements at one stride, got strides {list(y.stride())}")


def _run(x, v_a, core, u_b, s_a, s_b, offsets, backend=None) -> Tensor:
    y = x.new_zeros(*x.shape[:-1], u_b.shape[0])
    _run_inplace(y, x, v_a, core, u_b, s_a, s_b, offsets, backend)
    return y


def _fake(x, v_a, core, u_b, s_a, s_b, offsets, backend=None) -> Tensor:
    return x.new_empty(*x.shape[:-1], u_b.shape[0])


def _run_inplace(y, x, v_a, core, u_b, s_a, s_b, offsets, backend=None) -> None:
    implementation = dispatch.resolve("svd_lora", x.device.type, backend)
    _check_shrink("svd_lora", x, v_a, core, s_a, s_b, offsets)
    _check_expand("svd_lora", y, u_b, core.shape[0])
    rows = _rows_of_x(x)
    _check_offsets("svd_lora", offsets, rows.shape[0])
    implementation(_rows_of_y("svd_lora", y), rows, v_a, core, u_b, s_a, s_b, offsets)


def _fake_inplace(y, x, v_a, core, u_b, s_a, s_b, offsets, backend=None) -> None:
    return None


def _run_shrink(x, v_a, core, s_a, s_b, offsets, backend=None) -> Tensor:
    implementation = dispatch.resolve("svd_lora_shrink", x.device.type, backend)
    _check_shrink("svd_lora_shrink", x, v_a, core, s_a, s_b, offsets)
    rows = _rows_of_x(x)
    _check_offsets("svd_lora_shrink", offsets, rows.shape[0])
    h = rows.new_empty(rows.shape[0], core.shape[0], dtype=torch.float32)
    implementation(h, rows, v_a, core, s_a, s_b, offsets)
    return h


def _fake_shrink(x, v_a, core, s_a, s_b, offsets, backend=None) -> Tensor:
    return x.new_empty(x.numel() // x.shape[-1], core.shape[0], dtype=torch.float32)


def _run_expand(y, h, u_b, backend=None) -> None:
    implementation = dispatch.resolve("svd_lora_expand_", y.device.type, backend)
    implementation(_rows_of_y("svd_lora_expand_", y), h, u_b)


def _fake_expand(y, h, u_b, backend=None) -> None:
    return None


_SHARED = "Tensor core, Tensor u_b, Tensor s_a, Tensor s_b, Tensor offsets, str? backend=None"
_svd_lora_op = register(f"svd_lora(Tensor x, Tensor v_a, {_SHARED}) -> Tensor", _run, _fake)
_svd_lora_inplace_op = register(
    f"svd_lora_(Tensor(a!) y, Tensor x, Tensor v_a, {_SHARED}) -> ()", _run_inplace, _fake_inplace
)
_shrink_op = register(
    "svd_lora_shrink(Tensor x, Tensor v_a, Tensor core, Tensor s_a, Tensor s_b, Tensor offsets, str? backend=None) -> Tensor",
    _run_shrink,
    _fake_shrink,
)
_expand_op = register(
    "svd_lora_expand_(Tensor(a!) y, Tensor h, Tensor u_b, str? backend=None) -> ()", _run_expand, _fake_expand
)
