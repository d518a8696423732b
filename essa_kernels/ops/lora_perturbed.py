"""A LoRA whose two factors are perturbed per member: every row takes the factors plus its own member's noise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import dispatch
from ..noise import NoiseKey
from .registration import (
    beyond_decode,
    check_base_layer,
    check_contiguous,
    check_counter,
    check_distribution,
    check_floating,
    check_key,
    check_matrix,
    check_members,
    check_no_grad,
    check_offsets,
    check_real,
    check_tensors,
    direct,
    register,
    rows_of_x,
    rows_of_y,
)

OP, LINEAR = "lora_perturbed", "lora_perturbed_linear"


def lora_perturbed(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    key: NoiseKey,
    sigma: float,
    members: Tensor,
    offsets: Tensor,
    *,
    scaling: float = 1.0,
    distribution: str = "gaussian",
    y: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The LoRA delta of a batch whose rows belong to members that differ in the noise on their factors.

    Member m adds ``y += scaling * (B + s eps_B) ((A + s eps_A) x)`` to its rows, where s = sigma for an even m and
    -sigma for an odd one. The noise is drawn where it is used; a pair (2k, 2k + 1) of which both are there shares one
    draw. Parameters are widened to float32, perturbed and used in float32, never rounded to a lower precision on the
    way; sums are in float32. Results do not depend on the number of threads. No backward.

    Args:
        x: [..., d_in], float32, bfloat16 or float16; leading dimensions are flattened into rows. Any strides, but
            elements of a row that are not adjacent cost a copy.
        a: [r, d_in], x's dtype or float32: A. Its noise, a matrix of that shape, is drawn at ``key.site``.
        b: [d_out, r], a's dtype; either dimension may be the contiguous one: B. The noise of its transpose, a matrix
            [r, d_out], is drawn at ``key.site + 1``.
        key: seed, generation and site; the site is even.
        sigma: the scale of the noise, finite.
        members: [groups], int64: who the groups of rows belong to, 0 .. 2**33 - 1, distinct, in any order.
        offsets: [groups + 1], int64: group g is rows offsets[g] .. offsets[g + 1] - 1. Starts with 0, never descends,
            ends with the number of rows; groups may be empty. The content of members and offsets is checked on the
            CPU; on a GPU, where looking would stall the stream, it is trusted.
        scaling: LoRA's, finite.
        distribution: "gaussian" or "rademacher". Signs take a fraction of the normals' time to draw, which is most of
            the time where members have few rows.
        y: [..., d_out], x's dtype: accumulated in place. Its rows may have any stride, their elements are adjacent.
            It must not share memory with x. By default zeros.
        backend: "cpu", "cuda", "triton" or "reference"; by default the best available (see `explain`).

    All tensors are on one device; a, members and offsets are contiguous. Sizes are >= 1, but rows and groups may be 0.

    Returns:
        y, or without it a new [..., d_out] tensor that holds the delta alone.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, out of range, or does not fit the others; or a noise
            matrix has more than 2**32 blocks, ``r * ceil(d / tile) * 16`` with a tile of 64 (Rademacher: 2048).
        RuntimeError: the backend is not available, or an input requires grad while grad mode is on.

    Source: evolution strategies on LoRA's factors (Hu et al., arXiv 2106.09685); antithetic pairs as in Salimans et
    al., arXiv 1703.03864.
    """
    noise = (*check_key(OP, key, two_factors=True), check_real(OP, "sigma", sigma))
    rest = (check_real(OP, "scaling", scaling), check_distribution(OP, distribution), backend)
    if y is None:
        return _op(x, a, b, *noise, members, offsets, *rest)
    _inplace_op(y, x, a, b, *noise, members, offsets, *rest)
    return y


def lora_perturbed_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    key: NoiseKey,
    sigma: float,
    members: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    distribution: str = "gaussian",
    backend: str | None = None,
) -> Tensor:
    """A linear layer and its `lora_perturbed`: ``x weight^T + bias`` plus the delta of every row's member.

    On a GPU two Triton kernels: A's half as ever, then the base layer, whose every tile ends with its own columns of B
    and their noise. The result is written once and rounded once. On the CPU it is `torch.nn.functional.linear` followed
    by `lora_perturbed`, and rounded by each. No backward.

    Args:
        x, a, b, key, sigma, members, offsets, scaling, distribution: as in `lora_perturbed`.
        weight: [d_out, d_in], x's dtype, contiguous.
        bias: [d_out], x's dtype, contiguous.
        backend: "cpu", "triton" or "reference"; by default the best available (see `explain`).

    Returns:
        [..., d_out], x's dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as `lora_perturbed`.

    Source: as `lora_perturbed`.
    """
    noise = (*check_key(LINEAR, key, two_factors=True), check_real(LINEAR, "sigma", sigma))
    rest = (check_real(LINEAR, "scaling", scaling), check_distribution(LINEAR, distribution), backend)
    return _linear_op(x, weight, a, b, *noise, members, offsets, bias, *rest)


def _check(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    members: Tensor,
    offsets: Tensor,
    distribution: str,
    op: str = OP,
) -> None:
    check_no_grad(op, x=x, a=a, b=b, y=y)
    check_floating(op, "x", x)
    r, d_in = check_matrix(op, "a", a, "r, d_in")
    d_out, _ = check_matrix(op, "b", b, "d_out, r")
    if a.dtype is not x.dtype and a.dtype is not torch.float32:
        raise ValueError(f"{op}: a must have x's dtype, {x.dtype}, or torch.float32, got {a.dtype}")
    if members.dim() != 1:
        raise ValueError(f"{op}: members must have shape [groups], got {list(members.shape)}")
    groups = members.shape[0]
    check_tensors(
        op,
        x.device,
        ("x", x, x.dtype, "..., d_in", (*x.shape[:-1], d_in)),
        ("a", a, a.dtype, "r, d_in", (r, d_in)),
        ("b", b, a.dtype, "d_out, r", (d_out, r)),
        ("y", y, x.dtype, "..., d_out", (*x.shape[:-1], d_out)),
        ("members", members, torch.int64, "groups", (groups,)),
        ("offsets", offsets, torch.int64, "groups + 1", (groups + 1,)),
    )
    check_contiguous(op, a=a, members=members, offsets=offsets)
    if not (b.is_contiguous() or b.mT.is_contiguous()):
        raise ValueError(f"{op}: b or its transpose must be contiguous, got strides {list(b.stride())}")
    check_counter(op, "a", a.shape, r, d_in, distribution)
    check_counter(op, "b", b.shape, r, d_out, distribution)


def _run_inplace(
    y, x, a, b, seed, generation, site, sigma, members, offsets, scaling, distribution, backend=None
) -> None:
    noise = (seed, generation, site, sigma)
    done = direct(OP, backend, y, x, a, b, members, offsets, *noise, scaling, distribution == "rademacher")
    if done:
        increment_version(y)
        return
    implementation = dispatch.resolve(OP, x.device, backend, beyond_decode(x))
    if done is None:
        _check(y, x, a, b, members, offsets, distribution)
    x, y = rows_of_x(x), rows_of_y(OP, y)
    check_members(OP, members)
    check_offsets(OP, offsets, x.shape[0])
    if x.shape[0]:
        seed %= 2**64
        implementation(y, x, a, b, seed, generation, site, sigma, members, offsets, scaling, distribution)
        increment_version(y)


def _fake_inplace(
    y, x, a, b, seed, generation, site, sigma, members, offsets, scaling, distribution, backend=None
) -> None:
    _check(y, x, a, b, members, offsets, distribution)


def _run(x, a, b, *rest) -> Tensor:
    y = x.new_zeros(*x.shape[:-1], check_matrix(OP, "b", b, "d_out, r")[0])
    _run_inplace(y, x, a, b, *rest)
    return y


def _fake(x, a, b, *rest) -> Tensor:
    y = x.new_empty(*x.shape[:-1], check_matrix(OP, "b", b, "d_out, r")[0])
    _fake_inplace(y, x, a, b, *rest)
    return y


def _run_linear(
    x, weight, a, b, seed, generation, site, sigma, members, offsets, bias, scaling, distribution, backend=None
) -> Tensor:
    implementation = dispatch.resolve(LINEAR, x.device, backend)
    noise = (seed % 2**64, generation, site, sigma)
    y = _fake_linear(x, weight, a, b, *noise, members, offsets, bias, scaling, distribution)
    rows = rows_of_x(x)
    check_members(LINEAR, members)
    check_offsets(LINEAR, offsets, rows.shape[0])
    if rows.shape[0]:
        into = y.view(rows.shape[0], -1)
        implementation(into, rows, weight, bias, a, b, *noise, members, offsets, scaling, distribution)
    return y


def _fake_linear(
    x, weight, a, b, seed, generation, site, sigma, members, offsets, bias, scaling, distribution, backend=None
) -> Tensor:
    y = x.new_empty(*x.shape[:-1], check_matrix(LINEAR, "b", b, "d_out, r")[0])
    _check(y, x, a, b, members, offsets, distribution, LINEAR)
    check_base_layer(LINEAR, x, y.shape[-1], weight, bias)
    return y


_ARGUMENTS = (
    "Tensor x, Tensor a, Tensor b, SymInt seed, SymInt generation, SymInt site, float sigma, Tensor members, "
    "Tensor offsets, float scaling, str distribution, str? backend=None"
)

_op = register(f"{OP}({_ARGUMENTS}) -> Tensor", _run, _fake)
_inplace_op = register(f"{OP}_(Tensor(a!) y, {_ARGUMENTS}) -> ()", _run_inplace, _fake_inplace)
_linear_op = register(
    f"{LINEAR}(Tensor x, Tensor weight, Tensor a, Tensor b, SymInt seed, SymInt generation, SymInt site, float sigma, "
    "Tensor members, Tensor offsets, Tensor? bias, float scaling, str distribution, str? backend=None) -> Tensor",
    _run_linear,
    _fake_linear,
)
