"""EGGROLL: low-rank noise on a full weight, as a batched forward and as an update of the weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import dispatch
from ..noise import NoiseKey
from .registration import (
    as_tensors,
    as_weights,
    beyond_decode,
    check_apart,
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
    check_size,
    check_tensors,
    check_updated,
    check_weights,
    direct,
    fold_pairs,
    on_one_device,
    register,
    rows_of_x,
    rows_of_y,
)

PERTURBED, LINEAR, UPDATE = "lowrank_perturbed", "lowrank_perturbed_linear", "lowrank_update_"


def lowrank_perturbed(
    x: Tensor,
    d_out: int,
    key: NoiseKey,
    sigma: float,
    members: Tensor,
    offsets: Tensor,
    *,
    rank: int = 1,
    distribution: str = "gaussian",
    y: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """What low-rank noise on a weight [d_out, d_in] adds to the product of a batch whose rows belong to members.

    Member m adds ``y += s / sqrt(rank) * E (F^T x)`` to its rows, where s = sigma for an even m and -sigma for an odd
    one: a pair (2k, 2k + 1) has the same factors E and F, and one draw serves both. The factors are drawn where they are
    used. They and all sums are float32. Results do not depend on the number of threads. No backward.

    Args:
        x: [..., d_in], float32, bfloat16 or float16; leading dimensions are flattened into rows. Any strides, but
            elements of a row that are not adjacent cost a copy.
        d_out: the rows of the weight.
        key: seed, generation and site; the site is even. F^T [rank, d_in] is the noise of ``key.site``, E^T
            [rank, d_out] that of ``key.site + 1``, each as of member 2k.
        sigma: the scale of the noise, finite.
        members: [groups], int64: who the groups of rows belong to, 0 .. 2**33 - 1, distinct, in any order.
        offsets: [groups + 1], int64: group g is rows offsets[g] .. offsets[g + 1] - 1. Starts with 0, never descends,
            ends with the number of rows; groups may be empty. The content of members and offsets is checked on the
            CPU; on a GPU, where looking would stall the stream, it is trusted.
        rank: of the noise, >= 1.
        distribution: "gaussian" or "rademacher", of the factors' elements. Signs take a fraction of the normals' time
            to draw, which is most of the time where members have few rows.
        y: [..., d_out], x's dtype: accumulated in place, usually the product of x and the weight. Its rows may have any
            stride, their elements are adjacent. It must not share memory with x. By default zeros.
        backend: "cpu", "triton" or "reference"; by default the best available (see `explain`).

    All tensors are on one device; members and offsets are contiguous. Sizes are >= 1, but rows and groups may be 0.

    Returns:
        y, or without it a new [..., d_out] tensor that holds the noise's part alone.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, out of range, or does not fit the others; or a factor
            has more than 2**32 blocks, ``rank * ceil(d / tile) * 16`` with a tile of 64 (Rademacher: 2048).
        RuntimeError: the backend is not available, or an input requires grad while grad mode is on.

    Source: EGGROLL, arXiv 2511.16652.
    """
    noise = (*check_key(PERTURBED, key, two_factors=True), check_real(PERTURBED, "sigma", sigma))
    d_out, rank = check_size(PERTURBED, "d_out", d_out), check_size(PERTURBED, "rank", rank)
    rest = (members, offsets, rank, check_distribution(PERTURBED, distribution), backend)
    if y is None:
        return _perturbed_op(x, d_out, *noise, *rest)
    _perturbed_inplace_op(y, x, d_out, *noise, *rest)
    return y


def lowrank_perturbed_linear(
    x: Tensor,
    weight: Tensor,
    key: NoiseKey,
    sigma: float,
    members: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    rank: int = 1,
    distribution: str = "gaussian",
    backend: str | None = None,
) -> Tensor:
    """A linear layer and its `lowrank_perturbed`: ``x weight^T + bias`` plus what every row's member adds.

    On a GPU two Triton kernels: F's half as ever, then the base layer, whose every tile ends with its own columns of E.
    The result is written once and rounded once. On the CPU it is `torch.nn.functional.linear` followed by
    `lowrank_perturbed`, and rounded by each. No backward.

    Args:
        x, key, sigma, members, offsets, rank, distribution: as in `lowrank_perturbed`.
        weight: [d_out, d_in], x's dtype, contiguous.
        bias: [d_out], x's dtype, contiguous.
        backend: "cpu", "triton" or "reference"; by default the best available (see `explain`).

    Returns:
        [..., d_out], x's dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as `lowrank_perturbed`.

    Source: EGGROLL, arXiv 2511.16652.
    """
    noise = (*check_key(LINEAR, key, two_factors=True), check_real(LINEAR, "sigma", sigma))
    rest = (check_size(LINEAR, "rank", rank), check_distribution(LINEAR, distribution), backend)
    return _linear_op(x, weight, *noise, members, offsets, bias, *rest)


def lowrank_update_(
    w: Tensor | Sequence[Tensor],
    key: NoiseKey,
    weights: Tensor | Sequence[float],
    *,
    rank: int = 1,
    distribution: str = "gaussian",
    backend: str | None = None,
) -> Tensor | Sequence[Tensor]:
    """Add the weighted sum of the members' low-rank noise to a weight: ``w += sum_n weights[n] E_n F_n^T / sqrt(rank)``.

    The factors are those of `lowrank_perturbed`, with member n's sign on its weight, and are drawn a block at a time:
    what is held beside w is a fixed few megabytes a thread, whatever the number of members.

    The result has the same bits on every backend and for every number of threads. With g_k =
    fl32(fl32(weights[2k] - weights[2k + 1]) * fl32(1 / sqrt(rank))), every element starts from acc = +0 and takes, for
    the pairs k whose g_k is not 0 in ascending order and in each for c = 0 .. rank - 1, one correctly rounded float32
    ``acc = fma(fl32(g_k * E[i, c]), F[j, c], acc)``; then ``w[i, j] = round(fl32(float32(w[i, j]) + acc))``.

    Args:
        w: [d_out, d_in], float32, bfloat16 or float16, contiguous; or a sequence of such weights, all on the CPU or all
            on GPUs, of which number i draws from ``key.site + 2 * i``. On a GPU each is two launches.
        key: seed, generation and site of the first weight; the site is even.
        weights: [members], a float32 tensor on the CPU or on the device of the (first) w, or a sequence of numbers; they
            and the differences in their pairs are finite (checked on the CPU). Position n is member n. The last of an odd
            number has no partner. In a CUDA graph they are on the GPU.
        rank: of the noise, >= 1.
        distribution: "gaussian" or "rademacher", of the factors' elements.
        backend: "cpu", "triton" or "reference"; by default the best available (see `explain`).

    Returns:
        w.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, out of range, or does not fit the others; or a factor
            has more than 2**32 blocks, ``rank * ceil(d / tile) * 16`` with a tile of 64 (Rademacher: 2048).
        RuntimeError: the backend is not available, or a weight requires grad while grad mode is on.

    Source: EGGROLL, arXiv 2511.16652.
    """
    tensors = as_tensors(UPDATE, "w", w)
    noise, rank = check_key(UPDATE, key, two_factors=True), check_size(UPDATE, "rank", rank)
    weights = as_weights(UPDATE, weights)
    _update_op(tensors, *noise, weights, rank, check_distribution(UPDATE, distribution), backend)
    return w


def _check_perturbed(
    y: Tensor,
    x: Tensor,
    d_out: int,
    rank: int,
    members: Tensor,
    offsets: Tensor,
    distribution: str,
    op: str = PERTURBED,
) -> None:
    check_no_grad(op, x=x, y=y)
    check_floating(op, "x", x)
    d_in = x.shape[-1]
    if d_in < 1:
        raise ValueError(f"{op}: x must have shape [..., d_in] with d_in >= 1, got {list(x.shape)}")
    if members.dim() != 1:
        raise ValueError(f"{op}: members must have shape [groups], got {list(members.shape)}")
    groups = members.shape[0]
    check_tensors(
        op,
        x.device,
        ("y", y, x.dtype, "..., d_out", (*x.shape[:-1], d_out)),
        ("members", members, torch.int64, "groups", (groups,)),
        ("offsets", offsets, torch.int64, "groups + 1", (groups + 1,)),
    )
    check_contiguous(op, members=members, offsets=offsets)
    _check_factor(op, "d_in", rank, d_in, distribution)
    _check_factor(op, "d_out", rank, d_out, distribution)


def _check_factor(op: str, dim: str, rank: int, size: int, distribution: str) -> None:
    check_counter(op, f"[rank, {dim}]", (rank, size), rank, size, distribution)


def _run_perturbed_inplace(
    y, x, d_out, seed, generation, site, sigma, members, offsets, rank, distribution, backend=None
) -> None:
    noise = (seed, generation, site, sigma, rank, distribution == "rademacher")
    done = direct(PERTURBED, backend, y, x, members, offsets, d_out, *noise)
    if done:
        increment_version(y)
        return
    implementation = dispatch.resolve(PERTURBED, x.device, backend, beyond_decode(x))
    if done is None:
        _check_perturbed(y, x, d_out, rank, members, offsets, distribution)
    x, y = rows_of_x(x), rows_of_y(PERTURBED, y)
    check_members(PERTURBED, members)
    check_offsets(PERTURBED, offsets, x.shape[0])
    if x.shape[0]:
        implementation(y, x, seed % 2**64, generation, site, sigma, members, offsets, rank, distribution)
        increment_version(y)


def _fake_perturbed_inplace(
    y, x, d_out, seed, generation, site, sigma, members, offsets, rank, distribution, backend=None
) -> None:
    _check_perturbed(y, x, d_out, rank, members, offsets, distribution)


def _run_perturbed(
    x, d_out, seed, generation, site, sigma, members, offsets, rank, distribution, backend=None
) -> Tensor:
    _check_factor(PERTURBED, "d_out", rank, d_out, distribution)
    y = x.new_zeros(*x.shape[:-1], d_out)
    noise = (seed, generation, site, sigma)
    _run_perturbed_inplace(y, x, d_out, *noise, members, offsets, rank, distribution, backend)
    return y


def _fake_perturbed(x, d_out, *rest) -> Tensor:
    y = x.new_empty(*x.shape[:-1], d_out)
    _fake_perturbed_inplace(y, x, d_out, *rest)
    return y


def _run_linear(
    x, weight, seed, generation, site, sigma, members, offsets, bias, rank, distribution, backend=None
) -> Tensor:
    implementation = dispatch.resolve(LINEAR, x.device, backend)
    noise = (seed % 2**64, generation, site, sigma)
    y = _fake_linear(x, weight, *noise, members, offsets, bias, rank, distribution)
    rows = rows_of_x(x)
    check_members(LINEAR, members)
    check_offsets(LINEAR, offsets, rows.shape[0])
    if rows.shape[0]:
        into = y.view(rows.shape[0], -1)
        implementation(into, rows, weight, bias, *noise, members, offsets, rank, distribution)
    return y


def _fake_linear(
    x, weight, seed, generation, site, sigma, members, offsets, bias, rank, distribution, backend=None
) -> Tensor:
    d_out, _ = check_matrix(LINEAR, "weight", weight, "d_out, d_in")
    y = x.new_empty(*x.shape[:-1], d_out)
    _check_perturbed(y, x, d_out, rank, members, offsets, distribution, LINEAR)
    check_base_layer(LINEAR, x, d_out, weight, bias)
    return y


def _check_update(
    tensors: Sequence[Tensor], seed, generation, site, weights: Tensor, rank: int, distribution: str, backend=None
) -> None:
    check_updated(UPDATE, "w", tensors, site, sites_each=2)
    for i, tensor in enumerate(tensors):
        name = "w" if len(tensors) == 1 else f"w[{i}]"
        if tensor.dim() != 2:
            raise ValueError(f"{UPDATE}: {name} must have shape [d_out, d_in], got {list(tensor.shape)}")
        for cols in tensor.shape:
            check_counter(UPDATE, name, tensor.shape, rank, cols, distribution)
    check_weights(UPDATE, weights, tensors[0].device)


def _run_update(tensors, seed, generation, site, weights, rank, distribution, backend=None) -> None:
    implementation = dispatch.resolve(UPDATE, tensors[0].device, backend)
    _check_update(tensors, seed, generation, site, weights, rank, distribution)
    check_apart(UPDATE, "w", tensors)
    pair_weights = fold_pairs(UPDATE, weights, rank**-0.5)
    for first, part in on_one_device(UPDATE, tensors, site):
        # Without waiting: what is copied from pageable memory is staged before the call returns.
        there = pair_weights.to(part[0].device, non_blocking=True)
        implementation(part, seed % 2**64, generation, first, there, rank, distribution)
    for tensor in tensors:
        increment_version(tensor)


_PERTURBED_ARGUMENTS = (
    "Tensor x, SymInt d_out, SymInt seed, SymInt generation, SymInt site, float sigma, Tensor members, "
    "Tensor offsets, SymInt rank, str distribution, str? backend=None"
)
_UPDATE_ARGUMENTS = (
    "Tensor(a!)[] w, SymInt seed, SymInt generation, SymInt site, Tensor weights, SymInt rank, "
    "str distribution, str? backend=None"
)

_perturbed_op = register(f"{PERTURBED}({_PERTURBED_ARGUMENTS}) -> Tensor", _run_perturbed, _fake_perturbed)
_perturbed_inplace_op = register(
    f"{PERTURBED}_(Tensor(a!) y, {_PERTURBED_ARGUMENTS}) -> ()", _run_perturbed_inplace, _fake_perturbed_inplace
)
_linear_op = register(
    f"{LINEAR}(Tensor x, Tensor weight, SymInt seed, SymInt generation, SymInt site, float sigma, Tensor members, "
    "Tensor offsets, Tensor? bias, SymInt rank, str distribution, str? backend=None) -> Tensor",
    _run_linear,
    _fake_linear,
)
_update_op = register(f"{UPDATE}({_UPDATE_ARGUMENTS}) -> ()", _run_update, _check_update)
