"""ESSA's population forward: every row takes the LoRA whose singular values are those of its own member."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import dispatch
from .registration import (
    beyond_decode,
    check_base_layer,
    check_contiguous,
    check_floating,
    check_matrix,
    check_no_grad,
    check_offsets,
    check_tensors,
    direct,
    register,
    rows_of_x,
    rows_of_y,
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
        x: [..., d_in], float32, bfloat16 or float16; leading dimensions are flattened into rows. Any strides, but
            elements of a row that are not adjacent cost a copy.
        v_a: [r_a, d_in], x's dtype: V_A^T.
        core: [r_b, r_a], float32.
        u_b: [d_out, r_b], x's dtype; either dimension may be the contiguous one.
        s_a: [members, r_a], float32.
        s_b: [members, r_b], float32, with LoRA's scaling folded in.
        offsets: [members + 1], int64: member m owns rows offsets[m] .. offsets[m + 1] - 1. Starts with 0, never
            descends, ends with the number of rows; groups may be empty. Its content is checked on the CPU; on a GPU,
            where looking would stall the stream, it is trusted.
        y: [..., d_out], x's dtype: accumulated in place. Its rows may have any stride, their elements are adjacent.
            It must not share memory with x. By default zeros.
        backend: "cpu", "cuda", "triton" or "reference"; by default the best available (see `explain`).

    All tensors are on one device; all but x, u_b and y are contiguous. Sizes are >= 1, but rows and members may be 0.

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
        h: [rows, r_b], float32, from `svd_lora_shrink`, or a range of its columns. It must not share memory with y.
        u_b: [d_out, r_b], y's dtype; either dimension may be the contiguous one.
        backend: as in `svd_lora`.

    Returns:
        y.

    Raises:
        ValueError, RuntimeError: as `svd_lora`.
    """
    _expand_op(y, h, u_b, backend)
    return y


def svd_lora_linear(
    x: Tensor,
    weight: Tensor,
    v_a: Tensor,
    core: Tensor,
    u_b: Tensor,
    s_a: Tensor,
    s_b: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """A linear layer and its `svd_lora`: ``x weight^T + bias`` plus the delta of every row's member.

    On a GPU one Triton kernel computes base and delta: a tile of the result walks along all of x anyway, so for few rows
    it takes x v_a^T with it and ends with core, singular values and u_b; for many rows a shrink comes first, and the
    tile ends with u_b. The result is rounded once. On the CPU it is `torch.nn.functional.linear` followed by `svd_lora`,
    and rounded by each. No backward.

    Args:
        x, v_a, core, u_b, s_a, s_b, offsets: as in `svd_lora`.
        weight: [d_out, d_in], x's dtype, contiguous.
        bias: [d_out], x's dtype, contiguous.
        backend: "cpu", "triton" or "reference"; by default the best available (see `explain`).

    Returns:
        [..., d_out], x's dtype.

    Raises:
        ValueError, RuntimeError: as `svd_lora`.
    """
    return _linear_op(x, weight, v_a, core, u_b, s_a, s_b, offsets, bias, backend)


def svd_lora_expand_linear(
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    u_b: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """A linear layer and the second half of its `svd_lora`: ``x weight^T + bias + u_b h`` for every row.

    For many rows of projections that share one x: one `svd_lora_shrink` makes every projection's h, and each projection
    is one product that ends with its own columns of h. On a GPU that is one Triton kernel, which reads and writes the
    result once and rounds it once. On the CPU it is `torch.nn.functional.linear` followed by `svd_lora_expand_`, and
    rounded by each. No backward.

    Args:
        x: [..., d_in], float32, bfloat16 or float16, as in `svd_lora`.
        weight: [d_out, d_in], x's dtype, contiguous.
        h: [rows, r_b], float32, from `svd_lora_shrink`, or a range of its columns.
        u_b: [d_out, r_b], x's dtype; either dimension may be the contiguous one.
        bias: [d_out], x's dtype, contiguous.
        backend: "cpu", "triton" or "reference"; by default the best available (see `explain`).

    Returns:
        [..., d_out], x's dtype.

    Raises:
        ValueError, RuntimeError: as `svd_lora`.
    """
    return _expand_linear_op(x, weight, h, u_b, bias, backend)


def _check_shrink(op: str, x: Tensor, v_a: Tensor, core: Tensor, s_a: Tensor, s_b: Tensor, offsets: Tensor) -> None:
    check_no_grad(op, x=x, v_a=v_a, core=core, s_a=s_a, s_b=s_b)
    check_floating(op, "x", x)
    r_a, d_in = check_matrix(op, "v_a", v_a, "r_a, d_in")
    members, r_b = check_matrix(op, "s_b", s_b, "members, r_b", rows_at_least=0)
    check_tensors(
        op,
        x.device,
        ("x", x, x.dtype, "..., d_in", (*x.shape[:-1], d_in)),
        ("v_a", v_a, x.dtype, "r_a, d_in", (r_a, d_in)),
        ("core", core, torch.float32, "r_b, r_a", (r_b, r_a)),
        ("s_a", s_a, torch.float32, "members, r_a", (members, r_a)),
        ("s_b", s_b, torch.float32, "members, r_b", (members, r_b)),
        ("offsets", offsets, torch.int64, "members + 1", (members + 1,)),
    )
    check_contiguous(op, v_a=v_a, core=core, s_a=s_a, s_b=s_b, offsets=offsets)


def _check_svd_lora(
    y: Tensor,
    x: Tensor,
    v_a: Tensor,
    core: Tensor,
    u_b: Tensor,
    s_a: Tensor,
    s_b: Tensor,
    offsets: Tensor,
    op: str = "svd_lora",
) -> None:
    _check_shrink(op, x, v_a, core, s_a, s_b, offsets)
    check_no_grad(op, u_b=u_b, y=y)
    d_out, _ = check_matrix(op, "u_b", u_b, "d_out, r_b")
    check_tensors(
        op,
        x.device,
        ("u_b", u_b, x.dtype, "d_out, r_b", (d_out, core.shape[0])),
        ("y", y, x.dtype, "..., d_out", (*x.shape[:-1], d_out)),
    )
    _check_layout(op, u_b)


def _check_expand(y: Tensor, h: Tensor, u_b: Tensor, op: str = "svd_lora_expand_") -> None:
    check_no_grad(op, y=y, h=h, u_b=u_b)
    check_floating(op, "y", y)
    d_out, r_b = check_matrix(op, "u_b", u_b, "d_out, r_b")
    check_tensors(
        op,
        y.device,
        ("y", y, y.dtype, "..., d_out", (*y.shape[:-1], d_out)),
        ("u_b", u_b, y.dtype, "d_out, r_b", (d_out, r_b)),
        ("h", h, torch.float32, "rows, r_b", (y.numel() // d_out, r_b)),
    )
    _check_layout(op, u_b)
    if h.stride(1) != 1 and h.shape[1] > 1:
        raise ValueError(f"{op}: h must be rows of adjacent elements, got strides {list(h.stride())}")


def _check_layout(op: str, u_b: Tensor) -> None:
    if not (u_b.is_contiguous() or u_b.mT.is_contiguous()):
        raise ValueError(f"{op}: u_b or its transpose must be contiguous, got strides {list(u_b.stride())}")


def _run(x, v_a, core, u_b, s_a, s_b, offsets, backend=None) -> Tensor:
    y = x.new_zeros(*x.shape[:-1], check_matrix("svd_lora", "u_b", u_b, "d_out, r_b")[0])
    _run_inplace(y, x, v_a, core, u_b, s_a, s_b, offsets, backend)
    return y


def _fake(x, v_a, core, u_b, s_a, s_b, offsets, backend=None) -> Tensor:
    y = x.new_empty(*x.shape[:-1], check_matrix("svd_lora", "u_b", u_b, "d_out, r_b")[0])
    _check_svd_lora(y, x, v_a, core, u_b, s_a, s_b, offsets)
    return y


def _run_inplace(y, x, v_a, core, u_b, s_a, s_b, offsets, backend=None) -> None:
    done = direct("svd_lora", backend, y, x, v_a, core, u_b, s_a, s_b, offsets)
    if done:
        increment_version(y)
        return
    implementation = dispatch.resolve("svd_lora", x.device, backend, beyond_decode(x))
    if done is None:
        _check_svd_lora(y, x, v_a, core, u_b, s_a, s_b, offsets)
    x, y = rows_of_x(x), rows_of_y("svd_lora", y)
    check_offsets("svd_lora", offsets, x.shape[0])
    if x.shape[0]:
        implementation(y, x, v_a, core, u_b, s_a, s_b, offsets)
        increment_version(y)


def _fake_inplace(y, x, v_a, core, u_b, s_a, s_b, offsets, backend=None) -> None:
    _check_svd_lora(y, x, v_a, core, u_b, s_a, s_b, offsets)


def _check_linear(y, x, weight, v_a, core, u_b, s_a, s_b, offsets, bias) -> None:
    op = "svd_lora_linear"
    _check_svd_lora(y, x, v_a, core, u_b, s_a, s_b, offsets, op)
    check_base_layer(op, x, y.shape[-1], weight, bias)


def _run_linear(x, weight, v_a, core, u_b, s_a, s_b, offsets, bias, backend=None) -> Tensor:
    implementation = dispatch.resolve("svd_lora_linear", x.device, backend)
    y = _fake_linear(x, weight, v_a, core, u_b, s_a, s_b, offsets, bias)
    rows = rows_of_x(x)
    check_offsets("svd_lora_linear", offsets, rows.shape[0])
    if rows.shape[0]:
        implementation(y.view(rows.shape[0], -1), rows, weight, bias, v_a, core, u_b, s_a, s_b, offsets)
    return y


def _fake_linear(x, weight, v_a, core, u_b, s_a, s_b, offsets, bias, backend=None) -> Tensor:
    y = x.new_empty(*x.shape[:-1], check_matrix("svd_lora_linear", "u_b", u_b, "d_out, r_b")[0])
    _check_linear(y, x, weight, v_a, core, u_b, s_a, s_b, offsets, bias)
    return y


def _run_expand_linear(x, weight, h, u_b, bias, backend=None) -> Tensor:
    implementation = dispatch.resolve("svd_lora_expand_linear", x.device, backend)
    y = _fake_expand_linear(x, weight, h, u_b, bias)
    rows = rows_of_x(x)
    if rows.shape[0]:
        implementation(y.view(rows.shape[0], -1), rows, weight, bias, h, u_b)
    return y


def _fake_expand_linear(x, weight, h, u_b, bias, backend=None) -> Tensor:
    op = "svd_lora_expand_linear"
    check_no_grad(op, x=x)
    check_floating(op, "x", x)
    y = x.new_empty(*x.shape[:-1], check_matrix(op, "u_b", u_b, "d_out, r_b")[0])
    _check_expand(y, h, u_b, op)
    check_base_layer(op, x, y.shape[-1], weight, bias)
    return y


def _run_shrink(x, v_a, core, s_a, s_b, offsets, backend=None) -> Tensor:
    h = x.new_empty(x.shape[:-1].numel(), *s_b.shape[-1:], dtype=torch.float32)
    done = direct("svd_lora_shrink", backend, h, x, v_a, core, s_a, s_b, offsets)
    if done:
        return h
    implementation = dispatch.resolve("svd_lora_shrink", x.device, backend, beyond_decode(x))
    if done is None:
        _check_shrink("svd_lora_shrink", x, v_a, core, s_a, s_b, offsets)
    x = rows_of_x(x)
    check_offsets("svd_lora_shrink", offsets, x.shape[0])
    if x.shape[0]:
        implementation(h, x, v_a, core, s_a, s_b, offsets)
    return h


def _fake_shrink(x, v_a, core, s_a, s_b, offsets, backend=None) -> Tensor:
    _check_shrink("svd_lora_shrink", x, v_a, core, s_a, s_b, offsets)
    return x.new_empty(x.numel() // x.shape[-1], core.shape[0], dtype=torch.float32)


def _fake_expand(y, h, u_b, backend=None) -> None:
    _check_expand(y, h, u_b)


def _run_expand(y, h, u_b, backend=None) -> None:
    done = direct("svd_lora_expand_", backend, y, h, u_b)
    if done:
        increment_version(y)
        return
    implementation = dispatch.resolve("svd_lora_expand_", y.device, backend, beyond_decode(y))
    if done is None:
        _check_expand(y, h, u_b)
    y = rows_of_y("svd_lora_expand_", y)
    if y.shape[0]:
        implementation(y, h, u_b)
        increment_version(y)


_SHRINK_ARGUMENTS = "Tensor x, Tensor v_a, Tensor core, Tensor s_a, Tensor s_b, Tensor offsets, str? backend=None"
_ARGUMENTS = _SHRINK_ARGUMENTS.replace("core,", "core, Tensor u_b,")

_svd_lora_op = register(f"svd_lora({_ARGUMENTS}) -> Tensor", _run, _fake)
_svd_lora_inplace_op = register(f"svd_lora_(Tensor(a!) y, {_ARGUMENTS}) -> ()", _run_inplace, _fake_inplace)
_shrink_op = register(f"svd_lora_shrink({_SHRINK_ARGUMENTS}) -> Tensor", _run_shrink, _fake_shrink)
_expand_op = register(
    "svd_lora_expand_(Tensor(a!) y, Tensor h, Tensor u_b, str? backend=None) -> ()", _run_expand, _fake_expand
)
_linear_op = register(
    "svd_lora_linear(Tensor x, Tensor weight, Tensor v_a, Tensor core, Tensor u_b, Tensor s_a, Tensor s_b, "
    "Tensor offsets, Tensor? bias, str? backend=None) -> Tensor",
    _run_linear,
    _fake_linear,
)
_expand_linear_op = register(
    "svd_lora_expand_linear(Tensor x, Tensor weight, Tensor h, Tensor u_b, Tensor? bias, str? backend=None) -> Tensor",
    _run_expand_linear,
    _fake_expand_linear,
)
