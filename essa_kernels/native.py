"""The compiled kernels behind the implementations' common signatures: tensors become addresses, sizes and strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _C  # type: ignore[attr-defined]

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Whether compiled calls can take tensors: torch shows them how to read one since 2.10.
READS_TENSORS: bool = _C.use_exchange(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))


def direct(function: str) -> Callable[..., bool | None]:
    """The call that takes tensors, checks them and computes a function of this module; see `dispatch.direct`."""
    return getattr(_C, function.rstrip("_") + "_direct")


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


def svd_lora_linear(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    v_a: Tensor,
    core: Tensor,
    u_b: Tensor,
    s_a: Tensor,
    s_b: Tensor,
    offsets: Tensor,
) -> None:
    """y = x weight^T + bias by torch, then svd_lora_."""
    _linear(y, x, weight, bias)
    svd_lora_(y, x, v_a, core, u_b, s_a, s_b, offsets)


def svd_lora_expand_linear(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, u_b: Tensor) -> None:
    """y = x weight^T + bias by torch, then svd_lora_expand_."""
    _linear(y, x, weight, bias)
    svd_lora_expand_(y, h, u_b)


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


def lora_perturbed_linear(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    """y = x weight^T + bias by torch, then lora_perturbed_."""
    _linear(y, x, weight, bias)
    lora_perturbed_(y, x, a, b, seed, generation, site, sigma, members, offsets, scaling, distribution)


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


def lowrank_perturbed_linear(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: int,
    generation: int,
    site: int,
    sigma: float,
    members: Tensor,
    offsets: Tensor,
    rank: int,
    distribution: str,
) -> None:
    """y = x weight^T + bias by torch, then lowrank_perturbed_."""
    _linear(y, x, weight, bias)
    lowrank_perturbed_(y, x, seed, generation, site, sigma, members, offsets, rank, distribution)


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


def perturb_(
    tensors: Sequence[Tensor], seed: int, generation: int, site: int, member: int, sigma: float, distribution: str
) -> None:
    """tensor i += sigma eps, with the member's eps of site + 2 i."""
    # fmt: off
    _run(
        "perturb", tensors[0], *_matrices(tensors), seed, generation, site, member, sigma,
        distribution == "rademacher",
    )
    # fmt: on


def es_update_(
    tensors: Sequence[Tensor], seed: int, generation: int, site: int, pair_weights: Tensor, distribution: str
) -> None:
    """tensor i += sum over pairs of pair_weights[pair] eps, with eps drawn from site + 2 i."""
    # fmt: off
    _run(
        "es_update", tensors[0], *_matrices(tensors), seed, generation, site, pair_weights.data_ptr(),
        pair_weights.shape[0], distribution == "rademacher",
    )
    # fmt: on


def linear_logprob(
    logprob: Tensor,
    logsumexp: Tensor,
    slope: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> None:
    """logprob, the logits' logsumexp and slope = d logprob / d hidden of every row whose label is not ignored."""
    selected = (labels != ignore_index).nonzero()
    # fmt: off
    _run(
        "linear_logprob", logprob, logprob.data_ptr(), logsumexp.data_ptr(), _address(slope), hidden.data_ptr(),
        hidden.stride(0), weight.data_ptr(), labels.data_ptr(), _address(bias), selected.data_ptr(),
        selected.shape[0], hidden.shape[1], weight.shape[0], *_bend(logit_scale, softcap, temperature),
        DTYPE_CODE[hidden.dtype],
    )
    # fmt: on


def linear_logprob_backward(
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    grad: Tensor,
    slope: Tensor | None,
    logprob: Tensor,
    logsumexp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> None:
    """The gradients that are not None, from grad = d loss / d logprob and what `linear_logprob` left."""
    rows, d = hidden.shape
    dtype = DTYPE_CODE[hidden.dtype]
    # fmt: off
    if d_hidden is not None:
        _run(
            "linear_logprob_hidden", d_hidden, d_hidden.data_ptr(), grad.data_ptr(), _address(slope),
            labels.data_ptr(), rows, d, ignore_index, dtype,
        )
    if d_weight is not None or d_bias is not None:
        selected = (labels != ignore_index).nonzero()
        _run(
            "linear_logprob_head", grad, _address(d_weight), _address(d_bias), grad.data_ptr(), logprob.data_ptr(),
            logsumexp.data_ptr(), hidden.data_ptr(), hidden.stride(0), weight.data_ptr(), labels.data_ptr(),
            _address(bias), selected.data_ptr(), selected.shape[0], d, weight.shape[0],
            *_bend(logit_scale, softcap, temperature), dtype,
        )
    # fmt: on


def decode_attention(out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> None:
    """out = softmax(scale q k^T) v over the positions that are seen."""
    (rows, heads, d), (_, kv_heads, length, d_v) = query.shape, value.shape
    # fmt: off
    _run(
        "decode_attention", out, out.data_ptr(), query.data_ptr(), *query.stride()[:2], key.data_ptr(),
        *key.stride()[:3], value.data_ptr(), *value.stride()[:3], _address(mask),
        0 if mask is None else mask.stride(0), scale, rows, heads, kv_heads, length, d, d_v, DTYPE_CODE[query.dtype],
    )
    # fmt: on


def _matrices(tensors: Sequence[Tensor]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Address, rows, columns and dtype of every one of the contiguous [rows, cols] tensors."""
    rows, cols = ([tensor.shape[i] for tensor in tensors] for i in range(2))
    return [tensor.data_ptr() for tensor in tensors], rows, cols, [DTYPE_CODE[tensor.dtype] for tensor in tensors]


def multi_lora_(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ids: Tensor,
    scalings: Tensor | None,
    scaling: float,
) -> None:
    """y += scaling B (A x) with the adapter of every row; each id is that of rows / ids consecutive rows."""
    # fmt: off
    _run(
        "multi_lora", y, y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0),
        *_adapters(x, a, b, ids, scalings, scaling), y.shape[1], DTYPE_CODE[x.dtype], DTYPE_CODE[a[0].dtype],
    )
    # fmt: on


def multi_lora_backward(
    d_x: Tensor | None,
    d_a: Sequence[Tensor] | None,
    d_b: Sequence[Tensor] | None,
    d_y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ids: Tensor,
    scalings: Tensor | None,
    scaling: float,
) -> None:
    """The gradients that are not None, from d_y; d_x is added to."""
    # fmt: off
    _run(
        "multi_lora_backward", x, _address(d_x), x.shape[1], _addresses(d_a or ()), _addresses(d_b or ()),
        d_y.data_ptr(), d_y.stride(0), x.data_ptr(), x.stride(0),
        *_adapters(x, a, b, ids, scalings, scaling), d_y.shape[1], DTYPE_CODE[x.dtype], DTYPE_CODE[a[0].dtype],
    )
    # fmt: on


def _adapters(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], ids: Tensor, scalings: Tensor | None, scaling: float
) -> tuple:
    """Stored adapters, the rows' ids and d_in. Every tensor of a holds a stack of adapters, or just one."""
    ranks, stack = [tensor.shape[-2] for tensor in a], a[0].shape[0] if a[0].dim() == 3 else 1
    (rows, d_in), count = x.shape, ids.shape[0]
    which = ids.data_ptr(), count, rows // count, _address(scalings), scaling
    return _addresses(a), _addresses(b), ranks, stack, *which, d_in


def _linear(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """y = x weight^T + bias by torch."""
    if bias is None:
        torch.mm(x, weight.T, out=y)
    else:
        torch.addmm(bias, x, weight.T, out=y)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bend(logit_scale: float, softcap: float | None, temperature: float) -> tuple[bool, float, float]:
    """Whether logits are capped, and the factors within and outside of the cap."""
    if softcap is None:
        return False, 1.0, logit_scale / temperature
    return True, logit_scale / softcap, softcap / temperature


def _run(kernel: str, result: Tensor, *arguments: float | list[int]) -> None:
    """Run a kernel where its result is: on torch's threads, or on torch's current stream of that GPU."""
    if result.is_cpu:
        getattr(_C, f"{kernel}_cpu")(*arguments, torch.get_num_threads())
    else:
        with torch.cuda.device(result.device):
            getattr(_C, f"{kernel}_cuda")(*arguments, torch.cuda.current_stream().cuda_stream)
