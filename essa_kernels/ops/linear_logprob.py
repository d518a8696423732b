"""Log-probabilities of labels straight from hidden states and the LM head, without the logits in between."""

from __future__ import annotations

from operator import index

import torch
from torch import Tensor

from .. import dispatch
from .registration import (
    LIBRARY,
    check_are_tensors,
    check_contiguous,
    check_floating,
    check_matrix,
    check_real,
    check_tensors,
    register,
    rows_of_x,
)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """The log-probability of every label: ``log_softmax(z)[label]`` with z = cap(logit_scale (W h + bias)) / temperature.

    cap(z) = softcap tanh(z / softcap), or z without a softcap. Logits exist only block by block; sums are in float32,
    in a fixed order. Rows whose label is ``ignore_index`` cost nothing: their result and their gradient are 0.
    Differentiable once, in hidden, weight and bias. If hidden requires grad, the forward pass already makes the
    gradient of each row, in float32 or for bfloat16 in bfloat16; the weight's is made only where it requires grad, from
    logits computed again. Under autocast, floating-point arguments are cast to its dtype.

    Args:
        hidden: [..., d], float32, bfloat16 or float16; leading dimensions are flattened into rows. Any strides, but
            elements of a row that are not adjacent cost a copy.
        weight: [V, d], hidden's dtype, contiguous: the LM head.
        labels: [...], int64, 0 .. V - 1 or ignore_index. Their range is checked on the CPU; on a GPU, where looking
            would stall the stream, it is trusted.
        bias: [V], hidden's dtype, contiguous.
        logit_scale: multiplies the logits, finite: Cohere's logit_scale, or 1 / logits_scaling of Granite.
        softcap: > 0, Gemma 2's final_logit_softcapping. None: no cap.
        temperature: > 0.
        ignore_index: the label that marks rows to leave out.
        backend: "cpu", "triton" or "reference"; by default the best available (see `explain`).

    All tensors are on one device. Sizes are >= 1, but rows may be 0.

    Returns:
        [...], float32, whatever the dtype of hidden.

    Raises:
        TypeError, ValueError: a dtype, device, shape, stride or number is not as above.
        RuntimeError: the backend is not available; or a second derivative is asked for.

    Source: the online softmax of Milakov and Gimelshein, arXiv 1805.02867, over blocks of the vocabulary as in Cut
    Cross-Entropy, arXiv 2411.09009.
    """
    check_are_tensors("linear_logprob", hidden=hidden, weight=weight)
    if hidden.device.type != "meta" and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    settings = _check_settings(logit_scale, softcap, temperature, ignore_index)
    with_slope = torch.is_grad_enabled() and hidden.requires_grad
    logprob, _, _ = _forward_op(hidden, weight, labels, bias, *settings, with_slope, backend)
    return logprob


def _check_settings(
    logit_scale: float, softcap: float | None, temperature: float, ignore_index: int
) -> tuple[float, float | None, float, int]:
    op = "linear_logprob"
    check_real(op, "logit_scale", logit_scale)
    for name, value in (("softcap", 1.0 if softcap is None else softcap), ("temperature", temperature)):
        if check_real(op, name, value) <= 0:
            raise ValueError(f"{op}: {name} must be > 0, got {value!r}")
    try:
        ignore_index = index(ignore_index)
    except TypeError:
        raise TypeError(f"{op}: ignore_index must be an integer, got {ignore_index!r}") from None
    return logit_scale, softcap, temperature, ignore_index


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    op = "linear_logprob"
    check_floating(op, "hidden", hidden)
    vocab, d = check_matrix(op, "weight", weight, "V, d")
    check_tensors(
        op,
        hidden.device,
        ("hidden", hidden, hidden.dtype, "..., d", (*hidden.shape[:-1], d)),
        ("weight", weight, hidden.dtype, "V, d", (vocab, d)),
        ("labels", labels, torch.int64, "...", tuple(hidden.shape[:-1])),
    )
    check_contiguous(op, weight=weight)
    if bias is not None:
        check_tensors(op, hidden.device, ("bias", bias, hidden.dtype, "V", (vocab,)))
        check_contiguous(op, bias=bias)


def _check_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    if not labels.is_cpu:
        return
    wrong = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        got = f"{int(labels[at])} in row {at}"
        raise ValueError(f"linear_logprob: labels must be in 0 .. {vocab - 1} or {ignore_index}, got {got}")


def _flat(tensor: Tensor) -> Tensor:
    """As adjacent elements of one dimension."""
    return tensor.reshape(-1).contiguous()


def _slope_dtype(hidden: Tensor) -> torch.dtype:
    """float16 has too little range for a gradient that is not yet scaled."""
    return torch.bfloat16 if hidden.dtype is torch.bfloat16 else torch.float32


def _outputs(hidden: Tensor, labels: Tensor, with_slope: bool) -> tuple[Tensor, Tensor, Tensor]:
    logprob = hidden.new_zeros(labels.shape, dtype=torch.float32)
    slope = hidden.new_empty(hidden.shape if with_slope else (0,), dtype=_slope_dtype(hidden))
    return logprob, torch.zeros_like(logprob), slope


def _run(
    hidden, weight, labels, bias, logit_scale, softcap, temperature, ignore_index, with_slope, backend=None
) -> tuple[Tensor, Tensor, Tensor]:
    implementation = dispatch.resolve("linear_logprob", hidden.device, backend)
    _check(hidden, weight, labels, bias)
    rows, flat = rows_of_x(hidden), _flat(labels)
    _check_labels(flat, weight.shape[0], ignore_index)
    logprob, logsumexp, slope = _outputs(hidden, labels, with_slope)
    if len(flat):
        implementation(
            logprob.view(-1),
            logsumexp.view(-1),
            slope.view(rows.shape) if with_slope else None,
            rows,
            weight,
            flat,
            bias,
            logit_scale,
            softcap,
            temperature,
            ignore_index,
        )
    return logprob, logsumexp, slope


def _fake(
    hidden, weight, labels, bias, logit_scale, softcap, temperature, ignore_index, with_slope, backend=None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(hidden, weight, labels, bias)
    return _outputs(hidden, labels, with_slope)


def _gradients(hidden, weight, bias, wanted) -> list[Tensor]:
    """Contiguous tensors for the gradients of the three; empty ones where none is wanted."""
    return [
        hidden.new_empty(tensor.shape if want and tensor is not None else (0,))
        for tensor, want in zip((hidden, weight, bias), wanted, strict=True)
    ]


def _run_backward(
    grad,
    slope,
    logprob,
    logsumexp,
    hidden,
    weight,
    labels,
    bias,
    logit_scale,
    softcap,
    temperature,
    ignore_index,
    wanted,
    backend=None,
) -> tuple[Tensor, Tensor, Tensor]:
    implementation = dispatch.resolve("linear_logprob_backward", hidden.device, backend)
    d_hidden, d_weight, d_bias = _gradients(hidden, weight, bias, wanted)
    rows, flat = rows_of_x(hidden), _flat(labels)
    if not len(flat):
        return d_hidden.zero_(), d_weight.zero_(), d_bias.zero_()
    implementation(
        d_hidden.view(rows.shape) if wanted[0] else None,
        d_weight if wanted[1] else None,
        d_bias if wanted[2] else None,
        _flat(grad),
        slope.view(rows.shape) if wanted[0] else None,
        logprob.view(-1),
        logsumexp.view(-1),
        rows,
        weight,
        flat,
        bias,
        logit_scale,
        softcap,
        temperature,
        ignore_index,
    )
    return d_hidden, d_weight, d_bias


def _fake_backward(
    grad,
    slope,
    logprob,
    logsumexp,
    hidden,
    weight,
    labels,
    bias,
    logit_scale,
    softcap,
    temperature,
    ignore_index,
    wanted,
    backend=None,
) -> tuple[Tensor, Tensor, Tensor]:
    d_hidden, d_weight, d_bias = _gradients(hidden, weight, bias, wanted)
    return d_hidden, d_weight, d_bias


def _save(ctx, inputs, output) -> None:
    hidden, weight, labels, bias, *settings, with_slope, backend = inputs
    logprob, logsumexp, slope = output
    ctx.save_for_backward(slope, logprob, logsumexp, hidden, weight, labels, bias)
    ctx.settings, ctx.with_slope, ctx.backend = settings, with_slope, backend
    ctx.mark_non_differentiable(logsumexp, slope)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_) -> tuple[Tensor | None, ...]:
    by_hidden, by_weight, _, by_bias, *rest = ctx.needs_input_grad
    nothing = [None] * len(rest)
    if grad is None:
        return None, None, None, None, *nothing
    if by_hidden and not ctx.with_slope:
        raise RuntimeError("linear_logprob: hidden requires grad, but the forward pass ran without with_slope")
    wanted = [by_hidden, by_weight, by_bias]
    gradients = _backward_op(grad, *ctx.saved_tensors, *ctx.settings, wanted, ctx.backend)
    d_hidden, d_weight, d_bias = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return d_hidden, d_weight, None, d_bias, *nothing


def _refuse_second_derivative(ctx, *_) -> None:
    raise RuntimeError("linear_logprob has no second derivative")


_SETTINGS = "float logit_scale, float? softcap, float temperature, int ignore_index"
_forward_op = register(
    f"linear_logprob(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, {_SETTINGS}, bool with_slope, "
    "str? backend=None) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
_backward_op = register(
    "linear_logprob_backward(Tensor grad, Tensor slope, Tensor logprob, Tensor logsumexp, Tensor hidden, Tensor weight, "
    f"Tensor labels, Tensor? bias, {_SETTINGS}, bool[] wanted, str? backend=None) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
torch.library.register_autograd("essa::linear_logprob", _differentiate, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd("essa::linear_logprob_backward", _refuse_second_derivative, lib=LIBRARY)
