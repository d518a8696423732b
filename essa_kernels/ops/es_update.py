"""Evolution strategies on full weights: a member's perturbation, and the update that all members' rewards make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor
from torch.autograd.graph import increment_version

from .. import dispatch
from ..noise import MEMBER_END, NoiseKey, check_integer
from .registration import (
    as_tensors,
    as_weights,
    check_apart,
    check_counter,
    check_distribution,
    check_key,
    check_real,
    check_updated,
    check_weights,
    fold_pairs,
    matrix_of,
    on_one_device,
    register,
)

PERTURB, UPDATE = "perturb_", "es_update_"

Tensors = TypeVar("Tensors", Tensor, Sequence[Tensor])


def perturb_(
    t: Tensors,
    key: NoiseKey,
    member: int,
    sigma: float,
    *,
    distribution: str = "gaussian",
    backend: str | None = None,
) -> Tensors:
    """Add one member's noise to parameters, in place: ``t += sigma * eps``. No noise tensor is made.

    The result has the same bits on every backend and for every number of threads. With s = fl32(sigma) for an even
    member and -fl32(sigma) for an odd one, and the pair's eps as `gaussian` or `rademacher` draws it for the even
    member: ``t = round(fma(s, eps, float32(t)))``, one correctly rounded float32 fma and one rounding to t's dtype.

    To perturb by -sigma afterwards does NOT give the parameters back: each way rounds, in bfloat16 by up to 0.2 % of
    an element, and the differences pile up from member to member. Keep the base and copy it back, or draw the
    next member from it::

        t.copy_(base)
        perturb_(t, key, member, sigma)

    Args:
        t: float32, bfloat16 or float16, of any shape, contiguous; or a sequence of such tensors that share no memory, all
            on the CPU or all on GPUs, of which number i draws from ``key.site + 2 * i``. Leading dimensions are flattened
            into rows of the noise matrix, one dimension is one row, no dimension is one element; tensors without elements
            are legal. On a GPU the tensors of one dtype are one launch; a list that a CUDA graph is to hold has been
            given once before.
        key: seed, generation and site of the first tensor.
        member: 0 .. 2**33 - 1. Member 2k + 1 has minus the noise of member 2k.
        sigma: the scale of the noise, finite in float32.
        distribution: "gaussian" or "rademacher".
        backend: "cpu", "cuda", "triton" or "reference"; by default the best available (see `explain`).

    Returns:
        t.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, out of range, or does not fit the others; the last
            tensor's site is beyond 2**30 - 1; or a tensor has more than 2**32 blocks, ``rows * ceil(cols / tile) * 16``
            with a tile of 64 (Rademacher: 2048).
        RuntimeError: the backend is not available, or a tensor requires grad while grad mode is on.

    Source: "Evolution Strategies at Scale", arXiv 2509.24372.
    """
    tensors, (seed, generation, site) = as_tensors(PERTURB, "t", t), check_key(PERTURB, key)
    member, sigma = check_integer(f"{PERTURB}: member", member, MEMBER_END), check_real(PERTURB, "sigma", sigma)
    _perturb_op(tensors, seed, generation, site, member, sigma, check_distribution(PERTURB, distribution), backend)
    return t


def es_update_(
    t: Tensors,
    key: NoiseKey,
    weights: Tensor | Sequence[float],
    *,
    distribution: str = "gaussian",
    backend: str | None = None,
) -> Tensors:
    """Add the weighted sum of all members' noise to parameters, in place: ``t += sum_n weights[n] * eps_n``.

    The noise is that of `perturb_`, drawn again in registers and never stored: what is held beside t does not grow with
    the number of members, and t is read and written once. An antithetic pair costs one draw.

    The result has the same bits on every backend and for every number of threads. With g_k =
    fl32(weights[2k] - weights[2k + 1]), every element starts from acc = +0 and takes, for the pairs k whose g_k is not 0
    in ascending order, one correctly rounded float32 ``acc = fma(g_k, eps_2k, acc)``; then
    ``t = round(fl32(float32(t) + acc))``.

    Args:
        t: as in `perturb_`, a tensor or a sequence of which number i draws from ``key.site + 2 * i``.
        key: seed, generation and site of the first tensor.
        weights: [members], a float32 tensor on the CPU or on the device of the (first) t, or a sequence of numbers; at
            least one. They and the differences in their pairs are finite (checked on the CPU; on a GPU, where looking would
            stall the stream, it is trusted). Position n is member n. The last of an odd number has no partner. In a CUDA
            graph they are on the GPU.
        distribution: "gaussian" or "rademacher".
        backend: "cpu", "cuda", "triton" or "reference"; by default the best available (see `explain`).

    Returns:
        t.

    Raises:
        TypeError, ValueError, RuntimeError: as `perturb_`.

    Source: "Evolution Strategies at Scale", arXiv 2509.24372.
    """
    tensors, (seed, generation, site) = as_tensors(UPDATE, "t", t), check_key(UPDATE, key)
    weights = as_weights(UPDATE, weights)
    _update_op(tensors, seed, generation, site, weights, check_distribution(UPDATE, distribution), backend)
    return t


def _check(op: str, tensors: Sequence[Tensor], site: int, distribution: str) -> None:
    check_updated(op, "t", tensors, site)
    for i, tensor in enumerate(tensors):
        name = "t" if len(tensors) == 1 else f"t[{i}]"
        check_counter(op, name, tensor.shape, *matrix_of(tensor.shape), distribution)


def _matrices(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.view(matrix_of(tensor.shape)) for tensor in tensors]


def _run_perturb(tensors, seed, generation, site, member, sigma, distribution, backend=None) -> None:
    implementation = dispatch.resolve(PERTURB, tensors[0].device, backend)
    _check(PERTURB, tensors, site, distribution)
    check_apart(PERTURB, "t", tensors)
    for first, part in on_one_device(PERTURB, tensors, site):
        implementation(_matrices(part), seed % 2**64, generation, first, member, sigma, distribution)
    for tensor in tensors:
        increment_version(tensor)


def _fake_perturb(tensors, seed, generation, site, member, sigma, distribution, backend=None) -> None:
    _check(PERTURB, tensors, site, distribution)


def _run_update(tensors, seed, generation, site, weights, distribution, backend=None) -> None:
    implementation = dispatch.resolve(UPDATE, tensors[0].device, backend)
    _check(UPDATE, tensors, site, distribution)
    check_apart(UPDATE, "t", tensors)
    check_weights(UPDATE, weights, tensors[0].device)
    pair_weights = fold_pairs(UPDATE, weights)
    for first, part in on_one_device(UPDATE, tensors, site):
        # Without waiting: what is copied from pageable memory is staged before the call returns.
        there = pair_weights.to(part[0].device, non_blocking=True)
        implementation(_matrices(part), seed % 2**64, generation, first, there, distribution)
    for tensor in tensors:
        increment_version(tensor)


def _fake_update(tensors, seed, generation, site, weights, distribution, backend=None) -> None:
    _check(UPDATE, tensors, site, distribution)
    check_weights(UPDATE, weights, tensors[0].device)


_KEY = "Tensor(a!)[] t, SymInt seed, SymInt generation, SymInt site"
_OPTIONS = "str distribution, str? backend=None"

_perturb_op = register(f"{PERTURB}({_KEY}, SymInt member, float sigma, {_OPTIONS}) -> ()", _run_perturb, _fake_perturb)
_update_op = register(f"{UPDATE}({_KEY}, Tensor weights, {_OPTIONS}) -> ()", _run_update, _fake_update)
