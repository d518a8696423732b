"""Stored LoRA adapters in one batch: every row takes its own, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import dispatch
from .registration import (
    LIBRARY,
    Expected,
    as_tensors,
    check_are_tensors,
    check_contiguous,
    check_floating,
    check_real,
    check_tensors,
    direct,
    register,
    rows_of_x,
    rows_of_y,
)

OP = "multi_lora"


def multi_lora(
    x: Tensor,
    a: Tensor | Sequence[Tensor],
    b: Tensor | Sequence[Tensor],
    adapter_ids: Tensor,
    *,
    scaling: float | Sequence[float] | Tensor = 1.0,
    y: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The LoRA deltas of a batch whose rows belong to K stored adapters, in any order.

    Row i takes ``y += scaling[k] * b[k] (a[k] x)`` with its own adapter k. Sums are in float32, whatever the dtypes.
    Results do not depend on the number of threads. Differentiable once, in x, a, b and y; gradients are summed in
    float32 and rounded once. Where something requires grad, the delta is rounded before it is added to y.

    Args:
        x: [..., d_in], float32, bfloat16 or float16; leading dimensions are flattened into rows. Any strides, but
            elements of a row that are not adjacent cost a copy.
        a: a tensor [K, r, d_in], or a sequence of K tensors [r_k, d_in], each of its own rank, as they lie in a PEFT
            model; x's dtype or float32. On a GPU they are read where they are; a sequence that a CUDA graph is to hold
            has been given once before. Zeros in the last rows of a[k] and columns of b[k] stand for a smaller rank
            too, and stay zero under training.
        b: likewise [K, d_out, r] or K tensors [d_out, r_k], a's dtype.
        adapter_ids: int64: which adapter, 0 .. K - 1, or -1 for none. Its shape is that of x's leading dimensions or
            of the first few of them: for x [batch, tokens, d_in], [batch, tokens] or one for each sequence, [batch].
            Its range is checked on the CPU; on a GPU, where looking would stall the stream, other ids mean none.
        scaling: LoRA's: one finite number for all, K numbers, or a float32 tensor [K] on x's device (not K numbers in
            a CUDA graph).
        y: [..., d_out], x's dtype: accumulated in place. Its rows may have any stride, their elements are adjacent.
            It must not share memory with x. By default zeros.
        backend: "cpu", "triton" or "reference"; by default the best available (see `explain`).

    All tensors are on one device; those of a and b are contiguous. Sizes are >= 1, but rows may be 0.

    Returns:
        y, or without it a new [..., d_out] tensor that holds the deltas alone: 0 for rows without an adapter.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, out of range, or does not fit the others.
        RuntimeError: the backend is not available; or a second derivative is asked for.

    Source: LoRA, Hu et al., arXiv 2106.09685; many adapters in one batch as in Punica, arXiv 2310.18547.
    """
    check_are_tensors(OP, x=x, adapter_ids=adapter_ids, **({} if y is None else {"y": y}))
    a, b = as_tensors(OP, "a", a), as_tensors(OP, "b", b)
    scalings, scaling = _as_scaling(scaling, x)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *a, *b, *(() if y is None else (y,)))):
        delta = _op(x, a, b, adapter_ids, scalings, scaling, backend)
        if y is None:
            return delta
        check_tensors(OP, x.device, _as_y(y, x, delta.shape[-1]))
        rows_of_y(OP, y)
        return y.add_(delta)
    if y is None:
        y = x.new_zeros(*x.shape[:-1], _d_out(b))
    _inplace_op(y, x, a, b, adapter_ids, scalings, scaling, backend)
    return y


def _as_scaling(scaling: float | Sequence[float] | Tensor, x: Tensor) -> tuple[Tensor | None, float]:
    """Scaling as a tensor, if every adapter has its own, and a number."""
    if isinstance(scaling, Tensor):
        if torch.is_grad_enabled() and scaling.requires_grad:
            raise RuntimeError(f"{OP}: scaling requires grad, but {OP} has no gradient of it; detach it")
        return scaling, 1.0
    if isinstance(scaling, Sequence) and not isinstance(scaling, str):
        values = [float(check_real(OP, "scaling", value)) for value in scaling]
        return torch.tensor(values, dtype=torch.float32).to(x.device, non_blocking=True), 1.0
    return None, check_real(OP, "scaling", scaling)


def _d_out(b: Sequence[Tensor]) -> int:
    return b[0].shape[-2] if b[0].dim() in (2, 3) else 1


def _check(y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], ids: Tensor, scalings: Tensor | None) -> int:
    """Raise unless all arguments fit each other; return the number of adapters."""
    check_floating(OP, "x", x)
    adapters, d_in, d_out = _check_factors(x, a, b)
    check_tensors(OP, x.device, ("x", x, x.dtype, "..., d_in", (*x.shape[:-1], d_in)), _as_y(y, x, d_out))
    if ids.dtype is not torch.int64:
        raise ValueError(f"{OP}: adapter_ids must have dtype torch.int64, got {ids.dtype}")
    if not 0 < ids.dim() < x.dim() or ids.shape != x.shape[: ids.dim()]:
        leading = list(x.shape[:-1])
        raise ValueError(f"{OP}: adapter_ids must have the shape {leading} or its beginning, got {list(ids.shape)}")
    if ids.device != x.device:
        raise ValueError(f"{OP}: adapter_ids must be on {x.device}, got {ids.device}")
    if scalings is not None:
        check_tensors(OP, x.device, ("scaling", scalings, torch.float32, "K", (adapters,)))
        check_contiguous(OP, scaling=scalings)
    return adapters


def _as_y(y: Tensor, x: Tensor, d_out: int) -> Expected:
    return "y", y, x.dtype, "..., d_out", (*x.shape[:-1], d_out)


def _check_factors(x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[int, int, int]:
    """The number of adapters, d_in and d_out, if a and b fit each other."""
    stacked = a[0].dim() == 3 and len(a) == 1
    shape_a, shape_b = ("K, r, d_in", "K, d_out, r") if stacked else ("r_k, d_in", "d_out, r_k")
    dtype, device, d_in, d_out = a[0].dtype, x.device, a[0].shape[-1] if a[0].dim() else 0, _d_out(b)
    if dtype is not x.dtype and dtype is not torch.float32:
        raise ValueError(f"{OP}: {_name('a', a, 0)} must have x's dtype, {x.dtype}, or torch.float32, got {dtype}")
    if len(a) != len(b):
        raise ValueError(f"{OP}: b must hold as many adapters as a, {len(a)}, got {len(b)}")
    for k, (a_k, b_k) in enumerate(zip(a, b, strict=True)):
        shape = a_k.shape
        if len(shape) != 2 + stacked or min(shape) < 1 or shape[-1] != d_in:
            wanted = f"[{shape_a}]" + (f" with d_in = {d_in}, as {_name('a', a, 0)} has," if k else "")
            raise ValueError(f"{OP}: {_name('a', a, k)} must have shape {wanted} and sizes >= 1, got {list(shape)}")
        of_b = (shape[0], d_out, shape[1]) if stacked else (d_out, shape[0])
        if b_k.shape != of_b or d_out < 1:
            got = list(b_k.shape)
            raise ValueError(f"{OP}: {_name('b', b, k)} must have shape [{shape_b}] = {list(of_b)}, got {got}")
        if a_k.dtype is dtype is b_k.dtype and a_k.device == device == b_k.device:
            if a_k.is_contiguous() and b_k.is_contiguous():
                continue
            check_contiguous(OP, **{_name("a", a, k): a_k, _name("b", b, k): b_k})
        check_tensors(
            OP,
            device,
            (_name("a", a, k), a_k, dtype, shape_a, tuple(shape)),
            (_name("b", b, k), b_k, dtype, shape_b, of_b),
        )
    return a[0].shape[0] if stacked else len(a), d_in, d_out


def _name(name: str, tensors: Sequence[Tensor], k: int) -> str:
    return name if len(tensors) == 1 else f"{name}[{k}]"


def _check_ids(ids: Tensor, adapters: int) -> None:
    """Raise unless ids are in range. Only on the CPU: to look at a GPU's memory is to wait for it."""
    if ids.is_cpu and ids.numel():
        least, most = torch.aminmax(ids)
        if least < -1 or most >= adapters:
            got = int(least) if least < -1 else int(most)
            raise ValueError(f"{OP}: adapter_ids must be in -1 .. {adapters - 1}, got {got}")


def _run_inplace(y, x, a, b, ids, scalings, scaling, backend) -> None:
    done = direct(OP, backend, y, x, a, b, ids, scalings, scaling, has_backward=True)
    if done:
        increment_version(y)
        return
    implementation = dispatch.resolve(OP, x.device, backend)
    if done is None:
        _check_ids(ids, _check(y, x, a, b, ids, scalings))
    x, y, ids = rows_of_x(x), rows_of_y(OP, y), ids.reshape(-1).contiguous()
    if x.shape[0]:
        implementation(y, x, a, b, ids, scalings, scaling)
        increment_version(y)


def _fake_inplace(y, x, a, b, ids, scalings, scaling, backend) -> None:
    _check(y, x, a, b, ids, scalings)


def _run(x, a, b, ids, scalings, scaling, backend) -> Tensor:
    y = x.new_zeros(*x.shape[:-1], _d_out(b))
    _run_inplace(y, x, a, b, ids, scalings, scaling, backend)
    return y


def _fake(x, a, b, ids, scalings, scaling, backend) -> Tensor:
    y = x.new_empty(*x.shape[:-1], _d_out(b))
    _check(y, x, a, b, ids, scalings)
    return y


def _gradients(x, a, b, wanted) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Contiguous tensors for the gradients of the three; empty ones where none is wanted."""
    of_x, of_a, of_b = wanted
    d_x = x.new_zeros(x.shape if of_x else (0,))
    d_a, d_b = ([t.new_empty(t.shape if want else (0,)) for t in ts] for ts, want in ((a, of_a), (b, of_b)))
    return d_x, d_a, d_b


def _run_backward(d_y, x, a, b, ids, scalings, scaling, wanted, backend) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    implementation = dispatch.resolve("multi_lora_backward", x.device, backend)
    d_x, d_a, d_b = _gradients(x, a, b, wanted)
    rows = rows_of_x(x)
    if not rows.shape[0]:
        return d_x, [d.zero_() for d in d_a], [d.zero_() for d in d_b]
    implementation(
        d_x.view(rows.shape) if wanted[0] else None,
        d_a if wanted[1] else None,
        d_b if wanted[2] else None,
        rows_of_x(d_y),
        rows,
        a,
        b,
        ids.reshape(-1).contiguous(),
        scalings,
        scaling,
    )
    return d_x, d_a, d_b


def _fake_backward(d_y, x, a, b, ids, scalings, scaling, wanted, backend) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return _gradients(x, a, b, wanted)


def _save(ctx, inputs, output) -> None:
    x, a, b, ids, scalings, ctx.scaling, ctx.backend = inputs
    ctx.save_for_backward(x, ids, scalings, *a, *b)


def _differentiate(ctx, d_y) -> tuple:
    x, ids, scalings, *factors = ctx.saved_tensors
    a, b = factors[: len(factors) // 2], factors[len(factors) // 2 :]
    by_x, by_a, by_b, *_ = ctx.needs_input_grad
    wanted = [by_x, any(by_a), any(by_b)]
    d_x, d_a, d_b = _backward_op(d_y, x, a, b, ids, scalings, ctx.scaling, wanted, ctx.backend)
    return (
        d_x if by_x else None,
        [d if want else None for d, want in zip(d_a, by_a, strict=True)],
        [d if want else None for d, want in zip(d_b, by_b, strict=True)],
        None,
        None,
        None,
        None,
    )


def _refuse_second_derivative(ctx, *_) -> None:
    raise RuntimeError("multi_lora has no second derivative")


# No defaults: the dispatcher drops arguments that equal theirs, and autograd's support of lists then misses them.
_ARGUMENTS = "Tensor x, Tensor[] a, Tensor[] b, Tensor adapter_ids, Tensor? scalings, float scaling"

_op = register(f"{OP}({_ARGUMENTS}, str? backend) -> Tensor", _run, _fake)
_inplace_op = register(
    f"{OP}_(Tensor(a!) y, {_ARGUMENTS}, str? backend) -> ()",
    _run_inplace,
    _fake_inplace,
)
_backward_op = register(
    f"{OP}_backward(Tensor d_y, {_ARGUMENTS}, bool[] wanted, str? backend) -> (Tensor, Tensor[], Tensor[])",
    _run_backward,
    _fake_backward,
)
torch.library.register_autograd(f"essa::{OP}", _differentiate, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd(f"essa::{OP}_backward", _refuse_second_derivative, lib=LIBRARY)
