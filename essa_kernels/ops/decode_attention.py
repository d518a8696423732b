"""Attention while decoding: one query token a row over all keys and values of the row."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .registration import check_floating, check_no_grad, check_real, check_tensors, register


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale q k^T) v for one token of every row, with query heads that share key-value heads (GQA, MQA).

    Query heads that share keys and values read them together. Scores, the softmax and sums are in float32. No backward.
    A row's result does not depend on the other rows.

    Args:
        query: [rows, heads, d], float32, bfloat16 or float16. Query head h uses key-value head h // (heads / kv_heads).
        key: [rows, kv_heads, length, d], query's dtype: a KV cache, or the filled part of one.
        value: [rows, kv_heads, length, d_v], query's dtype.
        mask: [rows, length], bool: True at the positions that a row sees. None: all. Keys and values that are not seen
            must be finite.
        scale: of the scores; None: 1 / sqrt(d).
        backend: "cpu", "triton" or "reference"; by default the best available (see `explain`).

    All tensors are on one device, any strides, but the elements of the last dimension are adjacent. Sizes are >= 1, but
    rows and length may be 0.

    Returns:
        [rows, heads, d_v], query's dtype, contiguous; 0 where a row sees nothing.

    Raises:
        ValueError: a dtype, device, shape, stride or number is not as above.
        RuntimeError: the backend is not available, or an input requires grad while grad mode is on.

    Source: the online softmax of Milakov and Gimelshein, arXiv 1805.02867; grouped queries: arXiv 2305.13245.
    """
    if scale is not None:
        check_real("decode_attention", "scale", scale)
    return _op(query, key, value, mask, scale, backend)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    op = "decode_attention"
    check_floating(op, "query", query)
    for name, tensor, dims in (("query", query, "rows, heads, d"), ("key", key, "rows, kv_heads, length, d")):
        if tensor.dim() != dims.count(",") + 1:
            raise ValueError(f"{op}: {name} must have shape [{dims}], got {list(tensor.shape)}")
    rows, heads, d = query.shape
    kv_heads, length = key.shape[1:3]
    if min(heads, d, kv_heads) < 1 or heads % kv_heads:
        raise ValueError(
            f"{op}: query must have d >= 1 and a whole multiple of key's {kv_heads} heads, got {list(query.shape)}"
        )
    d_v = value.shape[-1] if value.dim() == 4 else 1
    if d_v < 1:
        raise ValueError(f"{op}: value must have d_v >= 1, got {list(value.shape)}")
    check_tensors(
        op,
        query.device,
        ("key", key, query.dtype, "rows, kv_heads, length, d", (rows, kv_heads, length, d)),
        ("value", value, query.dtype, "rows, kv_heads, length, d_v", (rows, kv_heads, length, d_v)),
    )
    tensors = {"query": query, "key": key, "value": value}
    check_no_grad(op, **tensors)
    if mask is not None:
        check_tensors(op, query.device, ("mask", mask, torch.bool, "rows, length", (rows, length)))
        tensors["mask"] = mask
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            raise ValueError(
                f"{op}: the elements of {name}'s last dimension must be adjacent, got strides {list(tensor.stride())}"
            )


def _run(query, key, value, mask, scale, backend=None) -> Tensor:
    implementation = dispatch.resolve("decode_attention", query.device, backend)
    out = _fake(query, key, value, mask, scale)
    if key.shape[2] == 0:
        return out.zero_()
    if out.numel():
        implementation(out, query, key, value, mask, query.shape[-1] ** -0.5 if scale is None else scale)
    return out


def _fake(query, key, value, mask, scale, backend=None) -> Tensor:
    _check(query, key, value, mask)
    return query.new_empty(*query.shape[:2], value.shape[-1])


_op = register(
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float? scale, str? backend) -> Tensor",
    _run,
    _fake,
)
